"""`tensafe rekey` and `tensafe rotate` on a real attestor's state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensorguard.cli.main import run
from tensorguard.package.inspection import read_unverified
from tensorguard.package.publishers import known_publishers
from tensorguard.store.audit import records_of
from tensorguard.store.packages import RegisteredPackage
from tensorguard.store.state import AttestorState
from tests.support.adapters import write_adapter, write_base_model

PRIVATE, PUBLIC = "tssp-signing-key.pem", "tssp-signing-key.pub.pem"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed adapter, its publisher's keys and its attestor's state."""
    folder = tmp_path_factory.mktemp("renewal")
    adapter, model = write_adapter(folder / "adapter"), write_base_model(folder / "model")
    assert run(["keys", "generate", "--output", str(folder / "keys")]) == 0
    command = ["pack", "--adapter", adapter, "--base-model", model, "--output", folder / "law.tssp"]
    command += ["--tenant", "acme", "--package-id", "law-style", "--sequence", "1"]
    command += ["--attestor-state", folder / "attestor", "--signing-key", folder / "keys" / PRIVATE]
    assert run([str(item) for item in command]) == 0
    return folder


@pytest.fixture
def folder(sealed: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    copy = shutil.copytree(sealed, tmp_path / "site")
    (copy / "attestor").chmod(0o700)
    return copy


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tensafe(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TENSAFE_ATTESTOR_STATE_DIR", str(folder / "attestor"))

    def call(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(line.split())
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def registered(folder: Path, package: str) -> RegisteredPackage:
    """What the attestor has for this file."""
    found = read_unverified(folder / package)
    with AttestorState.open(folder / "attestor") as state:
        return state.packages.lookup("acme", "law-style", found.manifest.sequence, found.digest)


def events(folder: Path) -> list[dict[str, Any]]:
    with AttestorState.open(folder / "attestor") as state, state.database.reading() as connection:
        return [json.loads(line) for line in records_of(connection)]


REKEY = f"rekey law.tssp --output next.tssp --signing-key keys/{PRIVATE}"
ROTATE = f"rotate law.tssp --output again.tssp --public-key keys/{PUBLIC} --signing-key new/{PRIVATE}"


def test_rekey_takes_the_next_sequence_and_a_key_of_its_own(folder: Path, tensafe: Run) -> None:
    code, out, _ = tensafe(REKEY)
    assert code == 0
    assert "law-style sequence 2" in out and "tensafe revoke version acme/law-style@1" in out
    old, new = registered(folder, "law.tssp"), registered(folder, "next.tssp")
    assert (old.sequence, new.sequence) == (1, 2)
    assert old.content_key != new.content_key and old.key_id != new.key_id
    assert tensafe(f"verify next.tssp --public-key keys/{PUBLIC}")[0] == 0
    code, _, err = tensafe(REKEY.replace("next.tssp", "third.tssp") + " --sequence 2")
    assert code == 3 and "not above 2, the newest one registered" in err
    code, _, err = tensafe(REKEY.replace("next.tssp", "third.tssp"))
    assert code == 0 and registered(folder, "third.tssp").sequence == 3, err
    with AttestorState.open(folder / "attestor") as state:
        assert state.packages.newest_sequence("acme", "law-style") == 3


@pytest.mark.parametrize(
    ("change", "code", "reason", "words"),
    [
        (("", " --sequence 1"), 3, "permission_denied", "not above 1"),
        (("next.tssp", "law.tssp"), 2, "configuration", "exists already"),
        (("keys/", "absent/"), 2, "configuration", "key file"),
        (("", " --public-key new/tssp-signing-key.pub.pem"), 3, "package", "not trusted here"),
        (("", " --attestor-state other"), 3, "not_found", "is registered"),
        (("", " --policy absent.yaml"), 2, "policy", "absent.yaml"),
    ],
)
def test_rekey_says_what_is_wrong(
    folder: Path, tensafe: Run, change: tuple[str, str], code: int, reason: str, words: str
) -> None:
    assert tensafe("keys generate --output new")[0] == 0
    line = REKEY.replace(*change) if change[0] else REKEY + change[1]
    found, out, err = tensafe(line)
    assert (found, out) == (code, "")
    assert f"[{reason}]" in err and words in err
    assert not (folder / "next.tssp").exists()
    with AttestorState.open(folder / "attestor") as state:
        assert state.packages.newest_sequence("acme", "law-style") == 1


def test_rotate_keeps_what_is_registered(folder: Path, tensafe: Run) -> None:
    assert tensafe("keys generate --output new")[0] == 0
    code, out, _ = tensafe(ROTATE)
    assert code == 0 and "as before" in out
    assert registered(folder, "again.tssp") == registered(folder, "law.tssp")
    assert tensafe(f"verify again.tssp --public-key new/{PUBLIC}")[0] == 0
    code, _, err = tensafe(f"verify again.tssp --public-key keys/{PUBLIC}")
    assert code == 3 and "not trusted here" in err
    assert len(known_publishers(folder / "attestor")) == 2
    last = events(folder)[-1]
    assert (last["event"], last["retired"]) == ("rotate_signing_key", False)
    assert last["new_signer"] == read_unverified(folder / "again.tssp").signer != last["old_signer"]


def test_a_retired_key_is_forgotten(folder: Path, tensafe: Run) -> None:
    assert tensafe("keys generate --output new")[0] == 0
    assert tensafe(ROTATE + " --retire")[0] == 0
    new = read_unverified(folder / "again.tssp").signer
    assert [path.name for path in known_publishers(folder / "attestor")] == [f"{new}.pub.pem"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("new/", "keys/"), 2, "the key that signed the package"),
        ((f"keys/{PUBLIC}", f"third/{PUBLIC}"), 3, "not trusted here"),
        (("again.tssp", "law.tssp"), 2, "exists already"),
    ],
)
def test_rotate_says_what_is_wrong(folder: Path, tensafe: Run, change: tuple[str, str], code: int, words: str) -> None:
    for name in ("new", "third"):
        assert tensafe(f"keys generate --output {name}")[0] == 0
    found, out, err = tensafe(ROTATE.replace(*change))
    assert (found, out) == (code, "") and words in err
    assert not (folder / "again.tssp").exists()
    assert known_publishers(folder / "attestor") and events(folder)[-1]["event"] == "register"
