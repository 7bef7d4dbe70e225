"""The guide's server command: what its options mean and what it refuses, without starting anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensorguard.backends.vllm import server
from tensorguard.backends.vllm.options import EngineOptions
from tensorguard.backends.vllm.server import build_parser, check, main
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import ConfigurationError
from tests.support.adapters import write_base_model
from tests.support.packages import pack_small_adapter


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


def test_several_adapters_leave_the_base_name_to_the_base_model(package: Path) -> None:
    options = ["--model", "m", "--he-lora-path", str(package), "--he-lora-path", str(package)]
    config, _ = check(build_parser().parse_args(options))
    assert (config.tssp_package_path, config.adapters, config.base_name_answers) == (package, (package,), "base")
    with pytest.raises(ConfigurationError, match="base_name_answers"):
        check(build_parser().parse_args([*options, "--base-name-answers", "adapter"]))


def test_engine_options_are_passed_on(package: Path) -> None:
    options = ["--model", "m", "--he-lora-path", str(package), "--dtype", "float32", "--max-model-len", "512"]
    options += ["--no-enable-prefix-caching", "--speculative-method", "ngram", "--num-speculative-tokens", "3"]
    _, given = check(build_parser().parse_args(options))
    assert given == {
        "dtype": "float32",
        "max_model_len": 512,
        "enable_prefix_caching": False,
        "speculative_method": "ngram",
        "num_speculative_tokens": 3,
    }


@pytest.mark.parametrize("name", [name for name in EngineOptions.model_fields if name != "model"])
def test_every_engine_option_is_an_option_of_the_command(name: str) -> None:
    assert f"--{name.replace('_', '-')}" in build_parser().format_help()


@pytest.mark.parametrize(
    "wrong", [["--prot", "1"], ["--he-lora", "x"], ["--base-name-answers", "both"], ["--port", "x"]]
)
def test_unknown_options_are_errors(package: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--model", "m", "--he-lora-path", str(package), *wrong])
    assert left.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_what_cannot_be_had_is_refused(package: Path) -> None:
    for wrong in (["--trust-remote-code"], ["--tensor-parallel-size", "0"], ["--require-attestation"]):
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


class StartedError(Exception):
    """Everything that could be checked before was right."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, a package for it, and an attestor's state that has its key."""
    folder = tmp_path_factory.mktemp("packed")
    pack_small_adapter(folder, folder / "state")
    return folder


@pytest.fixture
def command(packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command with changed options; the one line that it ends with before anything is started."""

    def start(*_: Any) -> None:
        raise StartedError

    def run(**changes: Path | str) -> str:
        options = {
            "model": packed / "model",
            "he-lora-path": packed / "law.tssp",
            "state-dir": packed / "state",
            "port": "0",
        } | {name.replace("_", "-"): value for name, value in changes.items()}
        capsys.readouterr()
        assert main([str(part) for name, value in options.items() for part in (f"--{name}", value)]) == 1
        output, errors = capsys.readouterr()
        assert output == ""
        (line,) = errors.splitlines()
        return line

    monkeypatch.setattr(server, "start_stack", start)
    monkeypatch.setattr(server, "prepare_command", lambda: None)  # the test run keeps its own signal handlers
    return run


def test_with_everything_right_it_starts(command: Callable[..., str]) -> None:
    with pytest.raises(StartedError):
        command()


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_another_base_model_is_refused_before_anything_starts(
    command: Callable[..., str], packed: Path, tmp_path: Path, what: str
) -> None:
    changes = {"rope_theta": 123456.0} if what == "config" else {}
    other = write_base_model(tmp_path / "other", **changes)
    if what == "tokenizer":
        (other / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}}}')
    line = command(model=other)
    assert f"has another {what}" in line and "Serve the model it was made for" in line
    assert line.endswith("[base_model_mismatch]")


def test_packages_that_do_not_verify_are_refused_before_anything_starts(
    command: Callable[..., str], packed: Path, tmp_path: Path
) -> None:
    data = bytearray((packed / "law.tssp").read_bytes())
    data[data.index(b"law-style")] ^= 1
    (tmp_path / "changed.tssp").write_bytes(data)
    line = command(he_lora_path=tmp_path / "changed.tssp")
    assert "changed.tssp" in line and line.endswith("get the file again from who packed it [package_tampered]")
    (tmp_path / "stranger.pem").write_bytes(SigningKeys.generate().public.to_pem())
    line = command(publisher_key=tmp_path / "stranger.pem")
    assert "not trusted here" in line and line.endswith("[package]")
    line = command(adapter_name="other")
    assert "is named 'law-style'" in line and line.endswith("[configuration]")


@pytest.mark.parametrize("name", ["TENSAFE_STACK_PROT", "TENSAFE_STAK_PORT"])
def test_unknown_variables_are_refused_by_name(
    command: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert name in command()
