"""Puts an attestor together from its settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from services.attestor.appraiser import Appraiser
from services.attestor.broker import KeyBroker
from services.attestor.callers import Callers
from services.attestor.certificates import CertificateIssuer, OwnCertificate
from services.attestor.decisions import Decisions
from services.attestor.rate_limits import Rate, RateLimiter
from services.attestor.servicer import RULES, RULES_WITH_TLS, AttestorServicer
from services.attestor.settings import AttestorSettings
from services.attestor.watch import RevocationWatch
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.endorsements import EndorsementDirectory
from tensorguard.evidence.policy import load_policy
from tensorguard.evidence.verifiers import verifier_of
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2
from tensorguard.rpc.server import Listener, Server, ServerOptions, Service, build_server
from tensorguard.rpc.tls import server_credentials
from tensorguard.store.nonces import NonceStore
from tensorguard.store.policies import policy_version
from tensorguard.store.state import AttestorState, StateLocation

log = structlog.get_logger(__name__)

MESSAGE_BYTES = 256 * 1024
_WORKERS = 16


@dataclass(frozen=True, slots=True)
class Attestor:
    """An attestor that is bound to its address and not started yet."""

    server: Server
    servicer: AttestorServicer
    state: AttestorState
    decisions: Decisions

    def close(self) -> None:
        """Record what is not recorded yet and close the state; call after the server has stopped."""
        self.decisions.flush()
        self.state.close()


def build_attestor(settings: AttestorSettings, *, clock: Callable[[], float] = time.time) -> Attestor:
    """Load or make the state, load the policy, bind the port.

    Raises ConfigurationError or PolicyError, or AuditError when the audit log was changed.
    """
    policy = load_policy(settings.policy_file)
    verifiers = {
        kind: verifier_of(kind, simulated_root=settings.simulated_root_public_key) for kind in policy.evidence_kinds
    }
    endorsements = EndorsementDirectory(settings.endorsements_dir, verifiers)
    endorsements.check(policy.evidence_kinds)
    url = settings.database_url
    state = AttestorState(
        StateLocation(
            settings.state_dir,
            None if url is None else url.get_secret_value(),
            settings.key_encryption_key,
            tuple(settings.witnesses),
        ),
        clock=clock,
    )
    try:
        decisions = Decisions(state.audit)
        nonces = NonceStore(state.database, life_seconds=settings.nonce_seconds, clock=clock)
        own = OwnCertificate(state.authorities, clock=clock) if settings.mutual_listen else None
        certificates = CertificateIssuer(state.authorities if own else None, decisions, clock=clock)
        callers = Callers(state.keys, policy, state.database, clock=clock)
        servicer = AttestorServicer(
            state.keys,
            policy,
            nonces,
            Appraiser(
                state.keys,
                policy,
                verifiers,
                nonces,
                decisions,
                certificates=certificates,
                endorsements=endorsements,
                clock=clock,
            ),
            KeyBroker(policy, callers, state.packages, state.database, decisions, clock=clock),
            RevocationWatch(state.database, callers, most=settings.watchers, clock=clock),
            state.audit,
            RateLimiter(_rate(settings.requests_per_peer), _rate(settings.requests)),
            certificates,
        )
        descriptor = attestor_pb2.DESCRIPTOR.services_by_name["AttestorService"]
        server = build_server(
            [Service(descriptor, servicer, RULES if own is None else RULES_WITH_TLS)],
            ServerOptions(
                settings.listen,
                workers=_WORKERS + settings.watchers,
                message_bytes=MESSAGE_BYTES,
                reflection=settings.reflection,
                plaintext_network=settings.plaintext_network,
                credentials=None if own is None else server_credentials(own.identity, mutual=False),
                further=_mutual(settings, own),
                health_address=settings.health_listen or "",
            ),
        )
        servicer.mutual_port = int(server.further_address.rpartition(":")[2] or 0)
        fields = {"policy_id": policy.id, "policy_sha256": policy.sha256}
        with state.audit.recording("start", fields) as connection:
            version = policy_version(connection, policy, int(clock()))
            fields["policy_version"] = str(version)
    except BaseException:
        state.close()
        raise
    if EvidenceKind.SIMULATED in policy.evidence_kinds:
        log.warning("SIMULATED EVIDENCE IS ACCEPTED: no hardware vouches for any workload", policy=policy.id)
    log.info(
        "attestor",
        thumbprint=state.key.thumbprint,
        policy=policy.id,
        policy_version=version,
        policy_sha256=policy.sha256,
    )
    return Attestor(server, servicer, state, decisions)


def _mutual(settings: AttestorSettings, own: OwnCertificate | None) -> Listener | None:
    """Where callers show a certificate."""
    if own is None or settings.mutual_listen is None:
        return None
    return Listener(settings.mutual_listen, server_credentials(own.identity), "--mutual-listen")


def _rate(per_second: float) -> Rate:
    return Rate(per_second, burst=max(1.0, 2 * per_second))
