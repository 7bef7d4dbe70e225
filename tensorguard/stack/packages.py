"""Checks, before anything is started, that a package can be served with an attestor state directory."""

from __future__ import annotations

from pathlib import Path

from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import ConfigurationError, NotFoundError
from tensorguard.package.base_model import check_base_model_folder
from tensorguard.package.publishers import known_publishers
from tensorguard.stack.services import PackagedAdapter
from tensorguard.store.database import FILE_NAME
from tensorguard.store.state import AttestorState


def find_adapter(
    package: Path,
    attestor_state: Path,
    name: str | None = None,
    publisher_keys: tuple[Path, ...] = (),
    base_model: str | None = None,
) -> PackagedAdapter:
    """Verify `package`, that its content key is registered in `attestor_state` and that it is for `base_model`.

    `publisher_keys` are who may have signed it; without any, those that `tensafe pack` remembered there.
    Raises ConfigurationError (missing file or key, wrong name), PackageError (not what was signed),
    BaseModelMismatchError.
    """
    # Not above: vLLM's processes import this module with their configuration, and do not start where numba is loaded.
    from tensorguard.package.reader import open_manifest

    if not package.is_file():
        raise ConfigurationError(f"there is no package {package}")
    state = attestor_state.expanduser().resolve()
    publishers = tuple(path.resolve() for path in publisher_keys) or known_publishers(state)
    if not publishers or not (state / FILE_NAME).is_file():
        raise ConfigurationError(_not_registered(package, state))
    keys = [VerifyingKeys.read(path) for path in publishers]
    verified = open_manifest(package, keys)
    manifest = verified.manifest
    try:
        with AttestorState.open(state) as opened:
            opened.packages.lookup(manifest.tenant, manifest.package_id, manifest.sequence, verified.digest)
    except NotFoundError:
        raise ConfigurationError(_not_registered(package, state)) from None
    if name is not None and name != manifest.package_id:
        raise ConfigurationError(
            f"the adapter in {package} is named {manifest.package_id!r}, not {name!r}: leave the name out, or "
            f"pack it again with --package-id {name}"
        )
    if base_model is not None:
        check_base_model_folder(manifest, base_model)
    return PackagedAdapter(manifest.package_id, package.resolve(), manifest.tenant, verified.digest, publishers)


def _not_registered(package: Path, state: Path) -> str:
    return (
        f"the content key of {package} is not registered in {state}: pack the adapter on this machine with "
        f"`tensafe pack --attestor-state {state}`, or name the directory where that was done with --state-dir"
    )
