"""A package is checked against the attestor's state before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import ConfigurationError, PackageError, PackageTamperedError
from tensorguard.package.publishers import known_publishers
from tensorguard.stack.packages import find_adapter
from tensorguard.store.state import AttestorState
from tests.support.packages import pack_small_adapter


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an attestor's state and, beside it, a package whose key is registered there."""
    folder = tmp_path_factory.mktemp("packages")
    pack_small_adapter(folder, folder / "attestor")
    return folder / "attestor"


def test_a_registered_package_is_found(state: Path) -> None:
    adapter = find_adapter(state.parent / "law.tssp", state)
    assert (adapter.name, adapter.tenant) == ("law-style", "acme")
    assert adapter.publisher_keys == known_publishers(state)
    assert find_adapter(state.parent / "law.tssp", state, "law-style") == adapter


def test_an_unregistered_key_is_named_as_the_problem(state: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not registered in"):
        find_adapter(state.parent / "law.tssp", tmp_path / "nowhere")
    other = tmp_path / "other"
    AttestorState.open(other).close()
    keys = known_publishers(state)
    with pytest.raises(ConfigurationError, match="is not registered in"):
        find_adapter(state.parent / "law.tssp", other, publisher_keys=keys)


def test_another_publisher_and_a_changed_file_are_refused(state: Path, tmp_path: Path) -> None:
    package = state.parent / "law.tssp"
    stranger = tmp_path / "stranger.pem"
    stranger.write_bytes(SigningKeys.generate().public.to_pem())
    with pytest.raises(PackageError):
        find_adapter(package, state, publisher_keys=(stranger,))
    changed = tmp_path / "changed.tssp"
    changed.write_bytes(package.read_bytes() + b"x")
    with pytest.raises(PackageTamperedError):
        find_adapter(changed, state)


def test_missing_file_and_wrong_name(state: Path) -> None:
    with pytest.raises(ConfigurationError, match="no package"):
        find_adapter(state.parent / "none.tssp", state)
    with pytest.raises(ConfigurationError, match="law-style"):
        find_adapter(state.parent / "law.tssp", state, "other-name")
