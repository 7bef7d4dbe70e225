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
from services.he_lora.revocations import RevocationFollower
from services.he_lora.servicer import HeLoraServicer
from services.he_lora.sessions import SessionRegistry
from services.he_lora.settings import HeLoraSettings
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.engines import Engine, EngineOptions, load_engine
from tensorguard.errors import ConfigurationError
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.platforms import this_platform
from tensorguard.observability.metrics import serve_metrics
from tensorguard.package.rollback import RollbackGuard
from tensorguard.rpc.server import Server, ServerOptions, build_server
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

    def start(self) -> None:
        """Serve, and keep the leases."""
        for keeper in self.keepers:
            keeper.start()
        self.follower.start()
        self.server.start()

    def close(self) -> None:
        """Report the tokens used and release everything; call after the server has stopped."""
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
    client = AttestorClient(settings.attestor, thumbprint=settings.attestor_thumbprint)
    if settings.attestor_thumbprint is None:
        log.warning("attestor key not pinned: set attestor_thumbprint", attestor=settings.attestor)
    platform = this_platform(simulated_root_key=settings.simulated_root_key)
    if platform.kind.value == "simulated":
        log.warning("SIMULATED EVIDENCE: no hardware vouches for this coprocessor")
    opener = PackageOpener(
        engine=engine,
        client=client,
        identity=WorkloadIdentity.generate(),
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
        store.all()[0].workload,
        store,
        registry,
        Evaluation(store),
        engine,
        shared_memory_bytes=settings.shared_memory_bytes,
    )
    server = build_server(
        [servicer.service()],
        ServerOptions(
            settings.listen,
            workers=settings.max_sessions + _SPARE_WORKERS,
            reflection=settings.reflection,
            listen_option="--listen or TENSAFE_HE_LORA_LISTEN",
            plaintext_network=settings.plaintext_network,
        ),
    )
    stop_metrics = serve_metrics(settings.metrics_listen) if settings.metrics_listen else _nothing
    follower = RevocationFollower(store.all()[0].workload, keepers, registry)
    return Coprocessor(server, servicer, tuple(keepers), follower, client, engine, stop_metrics)


def _nothing() -> None:
    return None
