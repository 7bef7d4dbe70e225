"""Puts a coprocessor together from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from services.he_lora.adapters import AdapterStore
from services.he_lora.evaluation import Evaluation
from services.he_lora.leases import LeaseKeeper
from services.he_lora.loading import PackageOpener
from services.he_lora.revocations import Revocations
from services.he_lora.servicer import HeLoraServicer
from services.he_lora.sessions import SessionRegistry
from services.he_lora.settings import HeLoraSettings
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.engines import Engine, EngineOptions, load_engine
from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.platforms import this_platform
from tensorguard.evidence.revocations import RevocationFollower
from tensorguard.evidence.tls import CertificateKeeper, CertifiedKey
from tensorguard.evidence.workload import Workload
from tensorguard.observability.metrics import serve_metrics
from tensorguard.package.rollback import RollbackGuard
from tensorguard.rpc.server import Server, ServerOptions, build_server
from tensorguard.rpc.tls import server_credentials
from tensorguard.session.shared_memory import sweep_abandoned_regions
from tensorguard.session.warm_up import warm_up

log = structlog.get_logger(__name__)

_SPARE_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Coprocessor:
    """A coprocessor that is bound to its address and not started yet."""

    server: Server
    servicer: HeLoraServicer
    keepers: tuple[LeaseKeeper, ...]
    follower: RevocationFollower
    client: AttestorClient
    engine: Engine[Any]
    stop_metrics: Callable[[], None]
    certificate: CertificateKeeper | None = None

    def start(self) -> None:
        """Serve, and keep leases and certificate."""
        if self.certificate is not None:
            self.certificate.start()
        for keeper in self.keepers:
            keeper.start()
        self.follower.start()
        self.server.start()

    def close(self) -> None:
        """Report the tokens used and release everything; call after the server has stopped."""
        if self.certificate is not None:
            self.certificate.stop()
        self.follower.stop()
        for keeper in self.keepers:
            keeper.stop()
        self.engine.close()
        self.stop_metrics()
        self.client.close()


def build_coprocessor(settings: HeLoraSettings) -> Coprocessor:
    """Attest, open every package, bind the port. Raises the TenSafe error that says what is wrong."""
    engine = load_engine(
        settings.backend,
        EngineOptions(settings.threads, settings.pool_bytes_per_key, settings.pool_bytes),
    )
    tls = None if settings.attestor_authority is None else CertifiedKey.read(settings.attestor_authority)
    client = AttestorClient(
        settings.attestor,
        thumbprint=settings.attestor_thumbprint,
        tls=tls,
        plaintext_network=settings.plaintext_network,
    )
    if settings.attestor_thumbprint is None:
        log.warning("attestor key not pinned: set attestor_thumbprint", attestor=settings.attestor)
    platform = this_platform(simulated_root_key=settings.simulated_root_key)
    if platform.kind.value == "simulated":
        log.warning("SIMULATED EVIDENCE: no hardware vouches for this coprocessor")
    identity = WorkloadIdentity.generate()
    # Without a package: a revoked one must not keep the others' sessions from being opened.
    workload = Workload(client, identity, platform, role=Role.COPROCESSOR, tenant=settings.tenant)
    opener = PackageOpener(
        engine=engine,
        client=client,
        identity=identity,
        platform=platform,
        tenant=settings.tenant,
        publishers=[VerifyingKeys.read(path) for path in settings.publisher_keys],
        tokens_per_lease=settings.tokens_per_lease,
        privacy_bound_log2=settings.privacy_bound_log2,
        rollback=RollbackGuard(settings.opened_releases_file),
    )
    log.info("compiling kernels (some seconds the first time on a machine)")
    warm_up()
    store, keepers = AdapterStore(), []
    for path in settings.packages:
        adapter = opener.open(path)
        if adapter.name in {known.name for known in store.all()}:
            raise ConfigurationError(f"{path}: package {adapter.name} is given twice")
        store.put(adapter)
        keepers.append(LeaseKeeper(store, adapter, partial(opener.open, path), settings.tokens_per_lease))
    registry = SessionRegistry(settings.max_sessions, settings.session_idle_seconds, settings.session_life_seconds)
    sweep_abandoned_regions()
    servicer = HeLoraServicer(
        workload,
        store,
        registry,
        Evaluation(store),
        engine,
        shared_memory_bytes=settings.shared_memory_bytes,
        tls=tls is not None,
    )
    server = build_server(
        [servicer.service()],
        ServerOptions(
            settings.listen,
            workers=settings.max_sessions + _SPARE_WORKERS,
            reflection=settings.reflection,
            listen_option="--listen or TENSAFE_HE_LORA_LISTEN",
            plaintext_network=settings.plaintext_network,
            credentials=None if tls is None else server_credentials(tls.identity),
            health_address=settings.health_listen or "",
        ),
    )
    stop_metrics = serve_metrics(settings.metrics_listen) if settings.metrics_listen else _nothing
    revocations = Revocations(identity.public.thumbprint, keepers, registry)
    follower = RevocationFollower(workload, revocations.apply)
    certificate = None if tls is None else CertificateKeeper(workload.token)
    return Coprocessor(server, servicer, tuple(keepers), follower, client, engine, stop_metrics, certificate)


def _nothing() -> None:
    return None
