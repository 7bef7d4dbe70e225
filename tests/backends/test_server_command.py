"""The guide's server command: what its options mean and what it refuses, without starting anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorguard.backends.vllm.server import build_parser, check, main
from tensorguard.errors import ConfigurationError


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "my_adapter.tssp"
    path.write_bytes(b"")
    return path


def test_the_guides_command_answers_the_base_name_with_the_adapter(package: Path) -> None:
    options = ["--model", "meta-llama/Llama-3-8B", "--he-lora-path", str(package), "--port", "8000"]
    config, given = check(build_parser().parse_args(options))
    assert config.base_name == "meta-llama/Llama-3-8B"
    assert config.base_name_answers == "adapter"
    assert given == {}


def test_engine_options_are_passed_on(package: Path) -> None:
    options = ["--model", "m", "--he-lora-path", str(package), "--dtype", "float32", "--max-model-len", "512"]
    _, given = check(build_parser().parse_args(options))
    assert given == {"dtype": "float32", "max_model_len": 512}


@pytest.mark.parametrize(
    "wrong", [["--prot", "1"], ["--he-lora", "x"], ["--base-name-answers", "both"], ["--port", "x"]]
)
def test_unknown_options_are_errors(package: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--model", "m", "--he-lora-path", str(package), *wrong])
    assert left.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_what_cannot_be_had_is_refused(package: Path) -> None:
    for wrong in (["--speculative-model", "m2"], ["--tensor-parallel-size", "2"], ["--require-attestation"]):
        options = build_parser().parse_args(["--model", "m", "--he-lora-path", str(package), *wrong])
        with pytest.raises(ConfigurationError, match=wrong[0].strip("-").split("-")[0]):
            check(options)


@pytest.mark.parametrize(
    ("flags", "required"), [([], None), (["--no-require-attestation"], False), (["--require-attestation"], True)]
)
def test_simulated_evidence_is_refused_only_on_demand(package: Path, flags: list[str], required: bool | None) -> None:
    options = build_parser().parse_args(["--model", "m", "--he-lora-path", str(package), *flags])
    assert options.require_attestation is required
    if required:
        with pytest.raises(ConfigurationError, match="--require-attestation"):
            check(options)
    else:
        assert check(options)[0].simulated_evidence_permitted


def test_an_unregistered_package_is_one_clear_error(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tmp_path), "--he-lora-path", str(package), "--state-dir", str(tmp_path / "state")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the content key of") and "is not registered in" in error
    assert main(["--model", "m", "--he-lora-path", str(tmp_path / "none.tssp")]) == 1
    assert "none.tssp" in capsys.readouterr().err
