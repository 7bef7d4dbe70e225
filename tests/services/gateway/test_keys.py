"""API keys: what the file holds, who is let in, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.keys import Caller, KeyStore, add_key, main
from tensorguard.errors import AuthenticationError, ConfigurationError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_lets_its_tenant_in(file: Path) -> None:
    first = add_key(file, tenant="one")
    second = add_key(file, tenant="two", models=("m",))
    store = KeyStore.load(file)
    assert store.authenticate(first).tenant == "one"
    assert store.authenticate(first).may_use("anything")
    caller = store.authenticate(second)
    assert caller.tenant == "two" and caller.may_use("m") and not caller.may_use("n")


@given(st.text(max_size=80))
def test_no_other_text_is_let_in(text: str) -> None:
    store = _STORE
    with pytest.raises(AuthenticationError):
        store.authenticate(text)


def _store_of_one() -> KeyStore:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        add_key(Path(folder) / "keys.json", tenant="one")
        return KeyStore.load(Path(folder) / "keys.json")


_STORE = _store_of_one()


def test_the_file_is_private_and_holds_no_key(file: Path) -> None:
    key = add_key(file, tenant="one")
    add_key(file, tenant="one", plain_key="tensafe-test")
    assert file.stat().st_mode & 0o777 == 0o600
    assert key not in file.read_text() and key[4:] not in file.read_text()
    assert "tensafe-test" not in file.read_text()
    file.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        KeyStore.load(file)


def test_the_same_key_has_another_digest_in_another_file(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        add_key(tmp_path / name, tenant="one", plain_key="tensafe-test")
        digests.add(json.loads((tmp_path / name).read_text())["keys"][0]["digest"])
    assert len(digests) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"surprise": 1},
        {"salt": "00"},
        {"keys": [{"key_id": "k", "tenant": "t", "models": [], "digest": "0" * 64, "created": 0}]},
        {
            "keys": [
                {
                    "key_id": "k",
                    "tenant": "t",
                    "models": ["*"],
                    "digest": "0" * 64,
                    "created": 0,
                    "modles": ["m"],
                }
            ]
        },
        {"keys": [{"key_id": "k", "tenant": "", "models": ["*"], "digest": "0" * 64, "created": 0}]},
    ],
)
def test_malformed_files_are_refused(file: Path, change: dict[str, object]) -> None:
    add_key(file, tenant="one")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigurationError, match="not a valid key file"):
        KeyStore.load(file)


def test_missing_and_empty_files(file: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        KeyStore.load(file)
    add_key(file, tenant="one")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"keys": []}))
    with pytest.raises(ConfigurationError, match="holds no key"):
        KeyStore.load(file)


def test_importing_twice_changes_nothing_but_never_widens(file: Path) -> None:
    add_key(file, tenant="one", plain_key="tensafe-test", models=("m",))
    before = file.read_text()
    add_key(file, tenant="one", plain_key="tensafe-test", models=("m",))
    assert file.read_text() == before
    for tenant, models in (("two", ("m",)), ("one", ("*",))):
        with pytest.raises(ConfigurationError, match="already"):
            add_key(file, tenant=tenant, plain_key="tensafe-test", models=models)


def test_command_line(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["create", "--file", str(file), "--tenant", "one", "--model", "m"]) == 0
    key = capsys.readouterr().out.strip()
    assert KeyStore.load(file).authenticate(key).models == frozenset({"m"})
    monkeypatch.setattr("sys.stdin", io.StringIO("tensafe-test\n"))
    assert main(["import", "--file", str(file), "--tenant", "one", "--plain-key"]) == 0
    assert isinstance(KeyStore.load(file).authenticate("tensafe-test"), Caller)
    with pytest.raises(SystemExit):
        main(["import", "--file", str(file), "--tenant", "one"])
    with pytest.raises(SystemExit):
        main(["create", "--file", str(file), "--tenan", "one"])
    assert "--tenan" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["import", "--file", str(file), "--tenant", "one", "--plain-key"]) == 1
