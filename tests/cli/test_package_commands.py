"""`tensafe pack`, `inspect`, `verify` and `keys generate`: output and exit codes."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorguard.cli.main import COMMANDS, run
from tensorguard.errors import NotFoundError
from tensorguard.store.state import AttestorState
from tests.support.adapters import adapter_config, adapter_tensors, write_adapter, write_base_model


@dataclass(frozen=True)
class Site:
    """Where the files of one test session are."""

    folder: Path
    package: Path
    public_key: Path

    def pack(self, **changes: str) -> list[str]:
        """Arguments of `tensafe pack`."""
        options = {
            "adapter": str(self.folder / "adapter"),
            "base-model": str(self.folder / "model"),
            "output": str(self.package),
            "tenant": "acme",
            "package-id": "law-style",
            "sequence": "1",
            "attestor-state": str(self.folder / "attestor"),
            "signing-key": str(self.folder / "keys" / "tssp-signing-key.pem"),
        } | {name.replace("_", "-"): value for name, value in changes.items()}
        return ["pack", *(item for name, value in options.items() for item in (f"--{name}", value))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    write_adapter(folder / "adapter")
    write_base_model(folder / "model")
    assert run(["keys", "generate", "--output", str(folder / "keys")]) == 0
    site = Site(folder, folder / "adapter.tssp", folder / "keys" / "tssp-signing-key.pub.pem")
    assert run(site.pack()) == 0
    return site


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tensafe(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_pack_registers_the_key(site: Site, tensafe: Run) -> None:
    code, out, _ = tensafe("inspect", str(site.package), "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["signatures_checked"] is False
    assert shown["manifest"]["moai"]["rotations"] == 0
    registry = AttestorState.open(site.folder / "attestor").packages
    stored = registry.lookup("acme", "law-style", 1, shown["digest"])
    assert stored.key_id == shown["manifest"]["key_id"]
    assert stored.token_budget == shown["manifest"]["token_budget"]
    assert stored.expires_at == shown["manifest"]["expires"]


def test_inspect_table(site: Site, tensafe: Run) -> None:
    code, out, _ = tensafe("inspect", str(site.package))
    assert code == 0
    for text in ("acme/law-style", "signatures not checked", "n4096-q90-w12", "rotations, evaluation keys", "2^-3"):
        assert text in out


def test_verify(site: Site, tensafe: Run) -> None:
    code, out, _ = tensafe("verify", str(site.package), "--public-key", str(site.public_key))
    assert code == 0
    assert "verified" in out
    code, out, _ = tensafe("verify", str(site.package), "--public-key", str(site.public_key), "--json")
    assert code == 0
    assert json.loads(out)["verified"] is True


def test_verify_refuses_changed_packages(site: Site, tensafe: Run, tmp_path: Path) -> None:
    content = bytearray(site.package.read_bytes())
    content[-1] ^= 1
    changed = tmp_path / "x.tssp"
    changed.write_bytes(content)
    code, out, err = tensafe("verify", str(changed), "--public-key", str(site.public_key), "--json")
    assert (code, out) == (3, "")
    assert "[package_tampered]" in err
    assert err.count("\n") == 1


def test_verify_refuses_other_signers(site: Site, tensafe: Run, tmp_path: Path) -> None:
    assert tensafe("keys", "generate", "--output", str(tmp_path))[0] == 0
    code, _, err = tensafe("verify", str(site.package), "--public-key", str(tmp_path / "tssp-signing-key.pub.pem"))
    assert code == 3
    assert "not trusted here" in err


def test_keys_are_private_and_kept(site: Site, tensafe: Run) -> None:
    private = site.folder / "keys" / "tssp-signing-key.pem"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    code, _, err = tensafe("keys", "generate", "--output", str(site.folder / "keys"))
    assert code == 2
    assert "not overwritten" in err
    assert private.read_bytes() == before


def test_pack_refuses_used_sequences(site: Site, tensafe: Run, tmp_path: Path) -> None:
    code, _, err = tensafe(*site.pack(output=str(tmp_path / "x.tssp")))
    assert code == 3
    assert "not above 1" in err
    assert not (tmp_path / "x.tssp").exists()


def test_pack_names_what_is_wrong(site: Site, tensafe: Run, tmp_path: Path) -> None:
    bad = write_adapter(tmp_path / "bad", config=adapter_config(use_dora=True))
    new = {"output": str(tmp_path / "x.tssp"), "sequence": "9"}
    cases = [
        ({"adapter": str(bad)}, 3, "use_dora"),
        ({"adapter": str(tmp_path / "absent")}, 3, "adapter_config.json"),
        ({"base_model": str(tmp_path / "absent")}, 2, "base model"),
        ({"signing_key": str(tmp_path / "absent")}, 2, "key file"),
        ({"signing_key": str(site.public_key)}, 2, "chmod 600"),
        ({"tenant": "Not A Name"}, 2, "tenant"),
        ({"parameter_set": "n1"}, 2, "unknown parameter set"),
        ({"privacy_bound": "-70"}, 3, "token budget"),
        ({"output": str(site.package)}, 2, "exists already"),
        ({"policy": str(tmp_path / "absent")}, 2, "policy"),
    ]
    for changes, expected, text in cases:
        code, _, err = tensafe(*site.pack(**(new | changes)))
        assert (code, text in err) == (expected, True), (changes, code, err)
        assert not (tmp_path / "x.tssp").exists()


PROJECTIONS = ("q_proj", "v_proj", "down_proj")  # of `adapter_config` and `adapter_tensors`


def without(tensors: dict[str, Any], text: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if text not in name}


def with_extra(name: str) -> dict[str, Any]:
    return adapter_tensors() | {name: np.zeros((16, 48), np.float32)}


@pytest.mark.parametrize(
    ("config", "tensors", "reason", "named"),
    [
        ({"use_dora": True}, None, "unsupported_adapter", "use_dora"),
        ({"bias": "all"}, None, "unsupported_adapter", "train with bias='none'"),
        ({"modules_to_save": ["lm_head"]}, None, "unsupported_adapter", "modules_to_save"),
        (
            {"target_modules": [*PROJECTIONS, "lm_head"]},
            None,
            "unsupported_adapter",
            "'lm_head' cannot be adapted; use",
        ),
        ({"r": 129}, None, "unsupported_adapter", "ranks go from 1 to 128"),
        ({"r": 8}, None, "unsupported_adapter", "expected [8, d_in]"),
        ({}, with_extra("base_model.model.lm_head.weight"), "unsupported_adapter", "lm_head.weight"),
        ({}, without(adapter_tensors(), "lora_B"), "missing_weights", "has no lora_B.weight: save the adapter again"),
        ({}, without(adapter_tensors(), "v_proj"), "missing_weights", "target module v_proj has no weights"),
        ({}, without(adapter_tensors(), "layers.1."), "missing_weights", "no weights for layer 1 of the base model"),
    ],
)
def test_pack_refuses_what_the_contract_does_not_allow(
    site: Site, tensafe: Run, tmp_path: Path, config: dict[str, Any], tensors: Any, reason: str, named: str
) -> None:
    bad = write_adapter(tmp_path / "bad", tensors, adapter_config(**config))
    code, out, err = tensafe(*site.pack(adapter=str(bad), output=str(tmp_path / "x.tssp"), sequence="9"))
    assert (code, out) == (3, "")
    assert f"[{reason}]" in err and named in err
    assert not (tmp_path / "x.tssp").exists()
    with pytest.raises(NotFoundError):  # nor was a key registered
        AttestorState.open(site.folder / "attestor").packages.lookup("acme", "law-style", 9, "ab" * 32)
    assert AttestorState.open(site.folder / "attestor").packages.newest_sequence("acme", "law-style") == 1


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_pack_names_the_adapters_missing_file(site: Site, tensafe: Run, tmp_path: Path, name: str) -> None:
    bad = write_adapter(tmp_path / "bad")
    (bad / name).unlink()
    code, _, err = tensafe(*site.pack(adapter=str(bad), output=str(tmp_path / "x.tssp"), sequence="9"))
    assert code == 3
    assert "[missing_weights]" in err and str(bad / name) in err


def test_pack_refuses_an_adapter_of_another_base_model(site: Site, tensafe: Run, tmp_path: Path) -> None:
    wide = write_base_model(tmp_path / "wide", hidden_size=64)
    code, _, err = tensafe(*site.pack(base_model=str(wide), output=str(tmp_path / "x.tssp"), sequence="9"))
    assert code == 3
    assert "[unsupported_adapter]" in err and "it is for another model" in err


def test_unknown_options_are_refused_by_name(site: Site, tensafe: Run) -> None:
    for command in (site.pack(), ["verify", str(site.package)], ["inspect", str(site.package)]):
        code, out, err = tensafe(*command, "--tokn-budget", "5")
        assert (code, out) == (2, "")
        assert "--tokn-budget" in err


@pytest.mark.parametrize("place", ["manifest", "signature", "part", "cut", "longer"])
def test_each_kind_of_tampering_is_refused_by_name(site: Site, tensafe: Run, tmp_path: Path, place: str) -> None:
    content = bytearray(site.package.read_bytes())
    manifest = content.index(b"law-style")
    signature = len(content) - sum(part["size"] for part in parts_of(site, tensafe)) - 1
    if place == "cut":
        del content[-1:]
    elif place == "longer":
        content += b"x"
    else:
        content[{"manifest": manifest, "signature": signature, "part": len(content) - 1}[place]] ^= 1
    changed = tmp_path / "changed.tssp"
    changed.write_bytes(content)
    code, out, err = tensafe("verify", str(changed), "--public-key", str(site.public_key))
    assert (code, out) == (3, "")
    assert "[package_tampered]" in err and str(changed) in err and "get the file again" in err


def parts_of(site: Site, tensafe: Run) -> list[dict[str, Any]]:
    _, out, _ = tensafe("inspect", str(site.package), "--json")
    return list(json.loads(out)["manifest"]["parts"])


def test_pack_takes_the_same_adapter_again_under_a_new_sequence(site: Site, tensafe: Run, tmp_path: Path) -> None:
    state = shutil.copytree(site.folder / "attestor", tmp_path / "attestor")
    code, out, _ = tensafe(
        *site.pack(output=str(tmp_path / "x.tssp"), sequence="2", attestor_state=str(state), expires_days="1")
    )
    assert code == 0
    assert "sequence 2" in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["pack"],
        ["verify", "x.tssp"],
        ["inspect", "--nonsense"],
        ["keys"],
        ["pack", "--sequence", "0"],
    ],
)
def test_wrong_usage(tensafe: Run, arguments: list[str]) -> None:
    assert tensafe(*arguments)[0] == 2


def test_inspect_of_something_else(tensafe: Run, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\x03\x04" * 100)
    code, _, err = tensafe("inspect", str(tmp_path / "x"))
    assert code == 3
    assert "not a .tssp package" in err


def test_help_lists_commands_without_importing_them() -> None:
    program = "import sys; from tensorguard.cli.main import run; run(['--help']); print('numba' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")
    for name in COMMANDS:
        assert name in result.stdout


def test_inspection_and_registry_need_no_ring_arithmetic() -> None:
    program = (
        "import sys, tensorguard.cli.inspect, tensorguard.store.packages\n"
        "print([name for name in ('numba', 'torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
