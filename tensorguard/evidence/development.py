"""State of an attestor for development on one machine: a simulated root and a policy that accepts it.

Nothing here is for production: whoever can read the simulated root's key can claim to be any code.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tensorguard.crypto.files import read_secret_file, replace_file, write_secret_file
from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.measurement import code_measurement
from tensorguard.evidence.policy import parse_policy
from tensorguard.store.state import AttestorState

log = structlog.get_logger(__name__)

MARKER = "# generated-for-development sha256:"
_COMMENT = """\
#
#   !!!  DEVELOPMENT ONLY: THIS POLICY ACCEPTS SIMULATED EVIDENCE  !!!
#
# Simulated evidence proves nothing about hardware. With this policy, anyone who can read the simulated root's
# key gets every package key of the tenants below. Never use it for an adapter that is worth protecting.
#
# It is written again, with the measurement of the code as it then is, whenever the development stack starts,
# as long as nobody edits it. To keep your own version, edit it: it is then left alone.
"""


@dataclass(frozen=True, slots=True)
class DevelopmentState:
    """Paths that the services of a development stack are configured with."""

    state_dir: Path
    policy_file: Path
    simulated_root_key: Path
    simulated_root_public_key: Path
    attestor_thumbprint: str
    """What clients pin."""


def initialise_development_state(
    state_dir: Path,
    tenant: str | Sequence[str],
    *,
    lease_seconds: int = 300,
    tokens_per_grant: int = 65_536,
    tokens_per_release: int = 100_000_000,
    measurement: str | None = None,
) -> DevelopmentState:
    """Make, or bring up to date, the state directory of a development attestor. Safe to call at every start.

    Keys are made once and never replaced. The policy is written only where there is none, or where the one
    that is there is an unedited generated one; anything else stays and is logged. Raises ConfigurationError.
    """
    with AttestorState.open(state_dir) as state:
        directory, thumbprint = state.directory, state.key.thumbprint
    root_key = directory / "simulated-root.pem"
    root_public = directory / "simulated-root.pub.pem"
    _make_root(root_key, root_public)
    policy = _policy_text(
        [tenant] if isinstance(tenant, str) else list(tenant),
        measurement if measurement is not None else code_measurement(),
        lease_seconds=lease_seconds,
        tokens_per_grant=tokens_per_grant,
        tokens_per_release=tokens_per_release,
    )
    policy_file = directory / "policy.yaml"
    _write_policy(policy_file, policy)
    return DevelopmentState(directory, policy_file, root_key, root_public, thumbprint)


def _make_root(private: Path, public: Path) -> None:
    if not private.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with contextlib.suppress(ConfigurationError):  # another process may have been faster
            write_secret_file(private, pem)
    key = serialization.load_pem_private_key(read_secret_file(private), None)
    replace_file(
        public,
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    )


def _policy_text(
    tenants: list[str],
    measurement: str,
    *,
    lease_seconds: int,
    tokens_per_grant: int,
    tokens_per_release: int,
) -> bytes:
    entry = {"evidence_kind": EvidenceKind.SIMULATED.value, "values": {"code": measurement}}
    document = {
        "version": 1,
        "id": "development",
        "evidence_kinds": [EvidenceKind.SIMULATED.value],
        "tenants": tenants,
        "roles": {role.value: {"measurements": [dict(entry)]} for role in Role},
        "lease": {
            "seconds": lease_seconds,
            "tokens_per_grant": tokens_per_grant,
            "tokens_per_release": tokens_per_release,
        },
    }
    # `values` would be shared between the roles, and the policy language has no aliases.
    body = _COMMENT + yaml.dump(document, Dumper=_NoAliases, sort_keys=False)
    parse_policy(body)
    return f"{MARKER}{hashlib.sha256(body.encode()).hexdigest()}\n{body}".encode()


def _write_policy(path: Path, policy: bytes) -> None:
    if path.exists():
        present = path.read_bytes()
        if present == policy:
            return
        if not _is_unedited(present):
            log.warning("development policy was edited and is left as it is", path=str(path))
            return
        log.warning("development policy is written again for the present code", path=str(path))
    else:
        log.warning("development policy accepts simulated evidence", path=str(path))
    replace_file(path, policy)


def _is_unedited(policy: bytes) -> bool:
    """Whether a policy is, byte for byte, one that was generated here."""
    first, _, body = policy.partition(b"\n")
    return first == f"{MARKER}{hashlib.sha256(body).hexdigest()}".encode()


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True
