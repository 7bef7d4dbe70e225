"""From endpoints to attached adapters: the worker's side of attestation and sessions.

Every adapter has a session of its own with its coprocessor, so its numbers are its own and its failures,
too. A session that broke is opened again in the background (`SessionKeeper`): until it is, the adapter's
requests fail at once instead of keeping the whole batch waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from tensorguard.backends.vllm.config import AdapterConnection, WorkerSettings
from tensorguard.backends.vllm.hooks import PendingDelta
from tensorguard.backends.vllm.install import AttachedGroup, AttachedProjection, Attachment
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import (
    DeltaUnavailableError,
    EvidenceRefusedError,
    PackageError,
)
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.platform import Platform
from tensorguard.evidence.simulated.collector import SimulatedPlatform
from tensorguard.evidence.workload import Workload
from tensorguard.models.identity import BaseModelIdentity, base_model_identity
from tensorguard.package.base_model import check_base_model
from tensorguard.session.client import AttachedAdapter, CoprocessorSession, SessionOptions

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
            # A failed attempt is logged by the session, which also spaces attempts out.
            with suppress(DeltaUnavailableError):
                self.session.ensure_open()


@dataclass(frozen=True, slots=True)
class AdapterDeltas:
    """The hooks' view of one attached adapter (`DeltaSource`)."""

    session: CoprocessorSession
    adapter: str

    def begin(self, layer: int, group: str, x: npt.NDArray[Any]) -> PendingDelta:
        """Encrypt x [T, d_in] and send it; failures show when it is awaited."""
        return self.session.begin(self.adapter, layer, group, x)


class AttachedAdapters:
    """All adapters of this worker. `attachments` is what the hooks need of them."""

    def __init__(
        self,
        attachments: Sequence[Attachment],
        evidence_kind: str,
        keepers: Sequence[tuple[SessionKeeper, AttachedAdapter]],
        resources: ExitStack,
    ) -> None:
        self.attachments = tuple(attachments)
        self.evidence_kind = evidence_kind
        self._keepers = tuple(keepers)
        self._resources = resources

    def status(self) -> list[dict[str, Any]]:
        """Per adapter: name, digest, sequence, the coprocessor's evidence kind, and its session's totals."""
        return [
            {
                "name": adapter.name,
                "digest": adapter.digest,
                "sequence": adapter.sequence,
                "coprocessor_evidence_kind": keeper.session.evidence_kind,
                **keeper.session.stats.snapshot(),
            }
            for keeper, adapter in self._keepers
        ]

    def close(self) -> None:
        """End all sessions and destroy their keys."""
        self._resources.close()


def attach_adapters(settings: WorkerSettings) -> AttachedAdapters:
    """Attest this host, open the sessions and attach every adapter of `settings`.

    Raises UnavailableError, EvidenceError, TokenError, PackageError, NotFoundError, ... as they come;
    BaseModelMismatchError where an adapter was packed for another base model.
    """
    platform = host_platform(settings)
    identity = WorkloadIdentity.generate()
    model = base_model_identity(settings.model_path)
    attachments, keepers = [], []
    with ExitStack() as resources:
        for connection in settings.adapters:
            client = AttestorClient(connection.attestor_endpoint, thumbprint=connection.attestor_thumbprint)
            resources.callback(client.close)
            workload = Workload(client, identity, platform, role=Role.INFERENCE, tenant=connection.tenant)
            keys = [VerifyingKeys.read(path) for path in connection.publisher_keys]
            options = SessionOptions(checked=connection.checked)
            session = CoprocessorSession.open(
                connection.coprocessor_endpoint, workload, verify_keys=keys, options=options
            )
            resources.callback(session.close)
            if settings.require_attestation and session.evidence_kind == EvidenceKind.SIMULATED.value:
                raise EvidenceRefusedError(_simulated(f"the coprocessor of adapter {connection.name!r}"))
            adapter = session.attach(connection.name)
            check_adapter(adapter, connection, model)
            keeper = SessionKeeper(session)
            resources.callback(keeper.close)
            keepers.append((keeper, adapter))
            source = AdapterDeltas(session, connection.name)
            attachments.append(Attachment(connection.name, groups_of(adapter), source))
        kept = resources.pop_all()
    return AttachedAdapters(attachments, platform.kind.value, keepers, kept)


def host_platform(settings: WorkerSettings) -> Platform:
    """What collects evidence about this process. Raises EvidenceRefusedError where nothing permitted can."""
    if settings.require_attestation:
        raise EvidenceRefusedError(_simulated("this host"))
    if settings.simulated_root_key is None:
        raise EvidenceRefusedError(
            "this host has no TEE whose evidence is supported, and no simulated_root_key to simulate one with"
        )
    return SimulatedPlatform(settings.simulated_root_key)


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
