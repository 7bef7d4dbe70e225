from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.attestor.server import Attestor, build_attestor
from services.attestor.settings import AttestorSettings
from tensorguard.evidence.claims import Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.development import DevelopmentState, initialise_development_state
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.release import Release
from tensorguard.evidence.simulated.collector import SimulatedPlatform
from tensorguard.evidence.workload import Workload
from tensorguard.store.audit import records_of, verify_records

CODE = "ab" * 48
CONTENT_KEY = os.urandom(32)
BUDGET = 1000
GRANT = 400
LEASE_SECONDS = 300


@dataclass
class Clock:
    """Time that only tests move."""

    now: float = field(default_factory=lambda: float(int(time.time())))

    def __call__(self) -> float:
        return self.now


class Bench:
    """A running attestor with one registered package, and workloads that talk to it over gRPC."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.clock = clock
        self.state: DevelopmentState = initialise_development_state(
            directory / "state",
            ["tenant", "other-tenant"],
            measurement=CODE,
            tokens_per_grant=GRANT,
            lease_seconds=LEASE_SECONDS,
        )
        self._clients: list[AttestorClient] = []
        self.attestor: Attestor = self._start()
        self.release = self.register("package", 1)

    def register(
        self,
        package_id: str,
        sequence: int,
        tenant: str = "tenant",
        key: bytes = CONTENT_KEY,
        release_policy_sha256: str = "",
    ) -> Release:
        digest = os.urandom(32)
        self.attestor.state.packages.register(
            digest.hex(),
            tenant,
            package_id,
            sequence,
            os.urandom(16).hex(),
            key,
            BUDGET,
            int(self.clock()) + 5000,
            release_policy_sha256,
        )
        return Release(tenant, package_id, sequence, digest)

    def settings(self) -> AttestorSettings:
        return AttestorSettings(
            state_dir=self.state.state_dir,
            policy_file=self.state.policy_file,
            simulated_root_public_key=self.state.simulated_root_public_key,
            listen="127.0.0.1:0",
        )

    def _start(self) -> Attestor:
        attestor = build_attestor(self.settings(), clock=self.clock)
        attestor.server.start()
        return attestor

    def client(self, thumbprint: str | None = None) -> AttestorClient:
        client = AttestorClient(
            self.attestor.server.address,
            thumbprint=thumbprint or self.state.attestor_thumbprint,
            clock=self.clock,
        )
        self._clients.append(client)
        return client

    def platform(self, measurement: str = CODE, *, debug: bool = False) -> SimulatedPlatform:
        return SimulatedPlatform(self.state.simulated_root_key, measurement=measurement, debug=debug, clock=self.clock)

    def workload(
        self,
        *,
        role: Role = Role.COPROCESSOR,
        tenant: str = "tenant",
        package_id: str = "package",
        identity: WorkloadIdentity | None = None,
    ) -> Workload:
        return Workload(
            self.client(),
            identity or WorkloadIdentity.generate(),
            self.platform(),
            role=role,
            tenant=tenant,
            package_id=package_id,
            clock=self.clock,
        )

    def restart(self) -> None:
        self.stop()
        self.attestor = self._start()

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()
        self.attestor.server.stop(0)
        self.attestor.close()

    @property
    def audit_lines(self) -> list[bytes]:
        """The whole audit log, verified."""
        with self.attestor.state.database.reading() as connection:
            lines = list(records_of(connection))
        verify_records(lines, self.attestor.state.key_set(), seen=[self.attestor.state.audit.head])
        return lines


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bench(tmp_path: Path, clock: Clock) -> Iterator[Bench]:
    made = Bench(tmp_path, clock)
    yield made
    made.stop()
