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

import pytest

from tensorguard.cli.main import COMMANDS, run
from tensorguard.package.registry import PackageKeyRegistry
from tests.support.adapters import adapter_config, write_adapter, write_base_model


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
    registry = PackageKeyRegistry(site.folder / "attestor")
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
        "import sys, tensorguard.cli.inspect, tensorguard.package.registry\n"
        "print([name for name in ('numba', 'torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
