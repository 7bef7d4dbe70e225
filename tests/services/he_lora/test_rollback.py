"""An attestor that was set back as a whole, which nothing of its own notices, does not set back its coprocessors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from services.he_lora.server import build_coprocessor
from services.he_lora.settings import HeLoraSettings
from tensorguard.errors import PackageRollbackError, PermissionDeniedError
from tensorguard.evidence.development import DevelopmentState, initialise_development_state
from tensorguard.package.reader import open_manifest
from tensorguard.package.renewal import rekey_package
from tensorguard.store.backup import back_up
from tensorguard.store.state import AttestorState
from tests.support.coprocessor import TENANT, World, running_attestor


def test_a_restarted_coprocessor_keeps_to_the_newest_release(world: World, tmp_path: Path) -> None:
    state = initialise_development_state(copy_of(world, tmp_path / "state"), TENANT)
    first = world.settings.packages[0]
    second = tmp_path / "second.tssp"
    backup = shutil.copytree(state.state_dir, tmp_path / "backup")
    rekey(world, state, first, second)
    opened = tmp_path / "opened.json"
    with running_attestor(state) as attestor:
        start(settings(world, state, attestor, second, opened))
        with pytest.raises(PackageRollbackError, match="older than 2") as refused:
            start(settings(world, state, attestor, first, opened))
        assert refused.value.reason == "package_rollback"
        with pytest.raises(PermissionDeniedError, match="was replaced by 2"):  # without the file: the attestor does
            start(settings(world, state, attestor, first, None))
    shutil.rmtree(state.state_dir)
    shutil.copytree(backup, state.state_dir)
    with running_attestor(state) as attestor:
        start(settings(world, state, attestor, first, None))  # this is what the file is for
        with pytest.raises(PackageRollbackError, match="older than 2"):
            start(settings(world, state, attestor, first, opened))


def copy_of(world: World, folder: Path) -> Path:
    """The state of the world's attestor while it runs, by way of its own backup."""
    folder.mkdir(mode=0o700)
    for name in ("kek", "audit.head", "simulated-root.pem", "simulated-root.pub.pem"):  # a head may be older, not newer
        shutil.copy2(world.state.state_dir / name, folder / name)
    with AttestorState.open(world.state.state_dir) as opened:
        back_up(opened, folder / "attestor.sqlite3")
    return folder


def rekey(world: World, state: DevelopmentState, first: Path, second: Path) -> None:
    verified = open_manifest(first, world.publisher.public)
    manifest = verified.manifest
    with AttestorState.open(state.state_dir) as opened:
        known = opened.packages.lookup(manifest.tenant, manifest.package_id, manifest.sequence, verified.digest)
        rekey_package(
            first,
            second,
            verified,
            known.content_key,
            sequence=2,
            signing_keys=world.publisher,
            key_registrar=opened.packages.register,
        )


def settings(
    world: World, state: DevelopmentState, attestor: str, package: Path, opened: Path | None
) -> HeLoraSettings:
    changes = {
        "packages": [package],
        "attestor": attestor,
        "attestor_thumbprint": state.attestor_thumbprint,
        "simulated_root_key": state.simulated_root_key,
        "opened_releases_file": opened,
    }
    return world.settings.model_copy(update=changes)


def start(configured: HeLoraSettings) -> None:
    coprocessor = build_coprocessor(configured)
    coprocessor.server.stop(0)
    coprocessor.client.close()
