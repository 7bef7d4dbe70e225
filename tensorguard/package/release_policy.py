"""The binding of a package to the attestor policy its publisher chose."""

from __future__ import annotations

from tensorguard.errors import PackageError
from tensorguard.package.manifest import Manifest


def check_release_policy(manifest: Manifest, policy_sha256: str) -> None:
    """Raise PackageError when the package names another policy than the one a token was issued under.

    `policy_sha256`: of that token (hex). A package that names no policy is content with the attestor's.
    """
    wanted = manifest.release_policy
    if wanted is not None and wanted.sha256 != policy_sha256:
        raise PackageError(
            f"package {manifest.tenant}/{manifest.package_id} may only be used under attestor policy {wanted.id} "
            f"(SHA-256 {wanted.sha256[:16]}...), but the attestor appraises under {policy_sha256[:16]}...: give the "
            "attestor that policy, or pack the adapter again with `--policy`"
        )
