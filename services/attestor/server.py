"""Puts an attestor together from its settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from services.attestor.appraiser import Appraiser
from services.attestor.broker import KeyBroker
from services.attestor.leases import LeaseBook
from services.attestor.nonces import NonceStore
from services.attestor.servicer import RULES, AttestorServicer
from services.attestor.settings import AttestorSettings
from tensorguard.evidence.audit import AuditLog
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.endorsements import EndorsementDirectory
from tensorguard.evidence.keys import AttestorKey
from tensorguard.evidence.policy import load_policy
from tensorguard.evidence.state import AttestorState
from tensorguard.evidence.verifiers import verifier_of
from tensorguard.package.registry import PackageKeyRegistry
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2
from tensorguard.rpc.server import Server, ServerOptions, Service, build_server

log = structlog.get_logger(__name__)

MESSAGE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Attestor:
    """An attestor that is bound to its address and not started yet."""

    server: Server
    audit: AuditLog

    def close(self) -> None:
        """Release the audit log; call after the server has stopped."""
        self.audit.close()


def build_attestor(settings: AttestorSettings, *, clock: Callable[[], float] = time.time) -> Attestor:
    """Load or make the state, load the policy, bind the port.

    Raises ConfigurationError or PolicyError, or AuditError when the audit log was changed.
    """
    policy = load_policy(settings.policy_file)
    state = AttestorState.open(settings.state_dir)
    verifiers = {
        kind: verifier_of(kind, simulated_root=settings.simulated_root_public_key) for kind in policy.evidence_kinds
    }
    endorsements = EndorsementDirectory(settings.endorsements_dir)
    key = AttestorKey.load_or_create(state.signing_key)
    audit = AuditLog(state.audit_log, key, clock=clock)
    try:
        nonces = NonceStore(life_seconds=settings.nonce_seconds, clock=clock)
        appraiser = Appraiser(key, policy, verifiers, nonces, audit, endorsements=endorsements, clock=clock)
        broker = KeyBroker(
            key,
            policy,
            PackageKeyRegistry(state.directory),
            LeaseBook(state.leases),
            audit,
            clock=clock,
        )
        servicer = AttestorServicer(key, policy, nonces, appraiser, broker, audit)
        descriptor = attestor_pb2.DESCRIPTOR.services_by_name["AttestorService"]
        server = build_server(
            [Service(descriptor, servicer, RULES)],
            ServerOptions(
                settings.listen,
                message_bytes=MESSAGE_BYTES,
                reflection=settings.reflection,
                plaintext_network=settings.plaintext_network,
            ),
        )
        audit.append("start", {"policy_id": policy.id, "policy_sha256": policy.sha256})
    except BaseException:
        audit.close()
        raise
    if EvidenceKind.SIMULATED in policy.evidence_kinds:
        log.warning("SIMULATED EVIDENCE IS ACCEPTED: no hardware vouches for any workload", policy=policy.id)
    log.info("attestor", thumbprint=key.thumbprint, policy=policy.id, policy_sha256=policy.sha256)
    return Attestor(server, audit)
