"""From endpoints to connected adapters: the worker's side of attestation and sessions.

Every adapter has a session of its own with its coprocessor, so its numbers are its own and its failures,
too. A session that broke is opened again in the background (`SessionKeeper`): until it is, the adapter's
requests fail at once instead of keeping the whole batch waiting.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
import structlog

from tensorguard.backends.vllm.config import AdapterConnection, WorkerSettings
from tensorguard.backends.vllm.hooks import PendingDelta
from tensorguard.backends.vllm.install import AttachedGroup, AttachedProjection, Attachment
from tensorguard.backends.vllm.rows import adapter_key
from tensorguard.errors import (
    DeltaUnavailableError,
    EvidenceRefusedError,
    PackageError,
)
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.platform import Platform
from tensorguard.evidence.platforms import hardware_kind, platform_of
from tensorguard.evidence.revocations import RevocationFollower
from tensorguard.evidence.simulated.collector import SimulatedPlatform
from tensorguard.evidence.workload import Workload
from tensorguard.models.identity import BaseModelIdentity, base_model_identity
from tensorguard.observability.logging import frames_of
from tensorguard.package.base_model import check_base_model
from tensorguard.session.client import AttachedAdapter, CoprocessorSession, SessionOptions
from tensorguard.session.handshake import packed_parameter_set

log = structlog.get_logger(__name__)

CHECK_SECONDS = 0.5


class SessionKeeper:
    """Opens a session again after it broke, and before its evidence is too old, from a thread of its own.

    The hooks never wait for that: while there is no session, `begin` yields deltas that fail at once.
    """

    def __init__(self, session: CoprocessorSession) -> None:
        self.session = session
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="he-lora-keeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking after the session. It is closed by whoever opened it."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(CHECK_SECONDS):
            try:
                self.session.ensure_open()
            except DeltaUnavailableError:
                pass  # logged by the session, which also spaces attempts out
            except Exception as error:  # the thread must live: without it the adapter would be gone for good
                log.error("session_keeper_failed", error_type=type(error).__name__, frames=frames_of(error))


@dataclass(frozen=True, slots=True)
class AdapterDeltas:
    """The hooks' view of one attached adapter (`DeltaSource`)."""

    session: CoprocessorSession
    adapter: str

    def begin(self, layer: int, group: str, x: npt.NDArray[Any]) -> PendingDelta:
        """Encrypt x [T, d_in] and send it; failures show when it is awaited."""
        return self.session.begin(self.adapter, layer, group, x)


@dataclass(frozen=True, slots=True)
class ConnectedAdapter:
    """One release of an adapter and the session it is computed through. `attachment` is what the hooks need of it."""

    name: str
    digest: str
    """SHA-256 of the manifest, hex."""
    sequence: int
    attachment: Attachment
    session: CoprocessorSession
    resources: ExitStack

    def status(self) -> dict[str, Any]:
        """The coprocessor's evidence kind and the session's totals."""
        return {"coprocessor_evidence_kind": self.session.evidence_kind, **self.session.stats.snapshot()}

    def close(self) -> None:
        """End the session and destroy its keys."""
        self.resources.close()


class Connector:
    """Attests this host and opens sessions with adapters' coprocessors."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._host: tuple[Platform, WorkloadIdentity, BaseModelIdentity] | None = None

    @property
    def evidence_kind(self) -> str:
        """Kind of this host's evidence; empty until it was needed."""
        return "" if self._host is None else self._host[0].kind.value

    def connect(self, connection: AdapterConnection) -> ConnectedAdapter:
        """Open a session with the adapter's coprocessor and fetch its manifest and basis. Takes seconds.

        Raises UnavailableError, EvidenceError, TokenError, PackageError, NotFoundError, ... as they come;
        BaseModelMismatchError where the adapter was packed for another base model.
        """
        platform, identity, model = self._this_host()
        with ExitStack() as resources:
            client = AttestorClient(
                connection.attestor_endpoint,
                thumbprint=connection.attestor_thumbprint,
                tls=connection.make_tls_key(),
                plaintext_network=self._settings.plaintext_network,
            )
            resources.callback(client.close)
            workload = Workload(client, identity, platform, role=Role.INFERENCE, tenant=connection.tenant)
            options = SessionOptions(
                checked=connection.checked,
                pool_bytes=self._settings.pool_bytes,
                shared_memory_bytes=self._settings.shared_memory_bytes,
            )
            session = CoprocessorSession.open(
                connection.coprocessor_endpoint,
                workload,
                verify_keys=connection.read_publisher_keys(),
                parameter_set=packed_parameter_set(
                    connection.coprocessor_endpoint,
                    workload,
                    connection.name,
                    connect_seconds=options.connect_seconds,
                    timeout_seconds=options.call_seconds,
                ),
                options=options,
            )
            resources.callback(session.close)
            follower = RevocationFollower(workload, session.revoke)
            resources.callback(follower.stop)
            hardware_only = self._settings.require_attestation or connection.require_attestation
            if hardware_only and session.evidence_kind == EvidenceKind.SIMULATED.value:
                raise EvidenceRefusedError(_simulated(f"the coprocessor of adapter {connection.name!r}"))
            adapter = session.attach(connection.name)
            check_adapter(adapter, connection, model)
            follower.start()
            resources.callback(SessionKeeper(session).close)
            return ConnectedAdapter(
                name=connection.name,
                digest=adapter.digest,
                sequence=adapter.sequence,
                attachment=Attachment(
                    adapter_key(connection.name, adapter.digest),
                    groups_of(adapter),
                    AdapterDeltas(session, connection.name),
                ),
                session=session,
                resources=resources.pop_all(),
            )

    def _this_host(self) -> tuple[Platform, WorkloadIdentity, BaseModelIdentity]:
        with self._lock:
            if self._host is None:
                platform = host_platform(self._settings)
                model = base_model_identity(self._settings.model_path)
                self._host = platform, WorkloadIdentity.generate(), model
            return self._host


class HostSettings(Protocol):
    """What decides how a host attests."""

    @property
    def simulated_root_key(self) -> Path | None: ...

    @property
    def require_attestation(self) -> bool: ...


def host_platform(settings: HostSettings) -> Platform:
    """What collects evidence about this process. Raises EvidenceRefusedError where nothing permitted can."""
    if settings.simulated_root_key is not None and not settings.require_attestation:
        return SimulatedPlatform(settings.simulated_root_key)
    kind = hardware_kind()
    if kind is not None:
        return platform_of(kind)
    if settings.require_attestation:
        raise EvidenceRefusedError(_simulated("this host"))
    raise EvidenceRefusedError(
        "this host has no TEE whose evidence is supported, and no simulated_root_key to simulate one with"
    )


def check_adapter(adapter: AttachedAdapter, connection: AdapterConnection, model: BaseModelIdentity) -> None:
    """Refuse an adapter other than the expected one, or one packed for another base model."""
    if connection.expected_digest is not None and adapter.digest != connection.expected_digest:
        raise PackageError(
            f"the coprocessor serves another release of adapter {connection.name!r} than the given "
            f"package (manifest {adapter.digest[:16]}..., expected {connection.expected_digest[:16]}...)"
        )
    check_base_model(adapter.manifest, model)


def groups_of(adapter: AttachedAdapter) -> tuple[AttachedGroup, ...]:
    """The manifest's groups with their bases; full mode has none."""
    full = adapter.manifest.moai.mode == "full"
    return tuple(
        AttachedGroup(
            layer=group.layer,
            group=group.group,
            d_in=group.d_in,
            projections=tuple(
                AttachedProjection(p.name, p.row_offset, p.rank, None if full else adapter.basis[group.layer, p.name])
                for p in group.projections
            ),
        )
        for group in adapter.manifest.moai.groups
    )


def _simulated(who: str) -> str:
    return (
        f"{who} offers no evidence from TEE hardware, only simulated evidence, and "
        "required attestation does not accept that; set require_attestation=False to permit it (for development)"
    )
