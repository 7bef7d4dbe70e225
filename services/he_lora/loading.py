"""From a sealed file to a served adapter: verify, attest, get the key, open, check, encode."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from services.he_lora.adapters import ServedAdapter
from services.he_lora.metering import TokenMeter
from tensorguard.ckks.parameters import get_parameter_set
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.engines import EncodedWeights, Engine
from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.client import AttestorClient
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.platform import Platform
from tensorguard.evidence.release import Release
from tensorguard.evidence.workload import Workload
from tensorguard.observability.metrics import HE_OP_LATENCY, TSSP_VERIFY_LATENCY, measured
from tensorguard.package.contract import group_plans
from tensorguard.package.reader import AdapterContents, open_manifest, read_adapter
from tensorguard.package.release_policy import check_release_policy
from tensorguard.package.rollback import RollbackGuard

log = structlog.get_logger(__name__)

_PROGRESS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class PackageOpener:
    """Opens packages of one tenant for one attested coprocessor."""

    engine: Engine[Any]
    client: AttestorClient
    identity: WorkloadIdentity
    platform: Platform
    tenant: str
    publishers: Sequence[VerifyingKeys]
    tokens_per_lease: int
    privacy_bound_log2: int
    rollback: RollbackGuard

    def open(self, path: Path) -> ServedAdapter:
        """Open and encode a package. The content key is forgotten when its parts are decrypted.

        Raises ConfigurationError (another tenant's package), PackageError and its kinds,
        EvidenceRefusedError, PermissionDeniedError, NotFoundError, BudgetExhaustedError, UnavailableError.
        """
        with measured(TSSP_VERIFY_LATENCY.observe):
            verified = open_manifest(path, self.publishers)
        manifest = verified.manifest
        if manifest.tenant != self.tenant:
            raise ConfigurationError(
                f"{path} belongs to tenant {manifest.tenant}, but this coprocessor serves {self.tenant}: "
                f"set --tenant {manifest.tenant}, or leave the package out"
            )
        self.rollback.check(verified)
        workload = Workload(
            self.client,
            self.identity,
            self.platform,
            role=Role.COPROCESSOR,
            tenant=self.tenant,
            package_id=manifest.package_id,
        )
        check_release_policy(manifest, workload.policy_sha256())
        release = Release(manifest.tenant, manifest.package_id, manifest.sequence, bytes.fromhex(verified.digest))
        released = workload.release_key(release, tokens_wanted=self.tokens_per_lease)
        started = time.perf_counter()
        contents = read_adapter(path, verified, released.content_key, privacy_bound_log2=self.privacy_bound_log2)
        self.rollback.remember(verified)
        parameters = get_parameter_set(manifest.moai.parameter_set)
        terms = released.terms
        del released
        groups = _encode(self.engine, manifest.package_id, contents, manifest.moai.parameter_set)
        seconds = time.perf_counter() - started
        HE_OP_LATENCY.labels("load_weights").observe(seconds * 1e3)
        log.info(
            "he.load_weights",
            adapter=manifest.package_id,
            sequence=manifest.sequence,
            seconds=round(seconds, 3),
            groups=len(groups),
            megabytes=round(sum(group.nbytes for group in groups.values()) / 1e6, 1),
            tokens_granted=terms.tokens_granted,
            lease_expires_at=terms.expires_at,
        )
        return ServedAdapter(
            name=manifest.package_id,
            tenant=manifest.tenant,
            digest=verified.digest,
            sequence=manifest.sequence,
            base_model=manifest.base_model.name,
            parameters=parameters,
            envelope=verified.envelope,
            basis=contents.u,
            groups=groups,
            meter=TokenMeter(terms),
            workload=workload,
        )


def _encode(
    engine: Engine[Any], name: str, contents: AdapterContents, parameter_set: str
) -> dict[tuple[int, str], EncodedWeights]:
    parameters = get_parameter_set(parameter_set)
    groups: dict[tuple[int, str], EncodedWeights] = {}
    reported = time.perf_counter()
    for done, group in enumerate(contents.groups):
        if time.perf_counter() - reported > _PROGRESS_SECONDS:
            reported = time.perf_counter()
            log.info("encoding", adapter=name, groups_done=done, groups=len(contents.groups))
        plans = group_plans(group.info, parameters)
        groups[group.info.layer, group.info.group] = engine.encode(group.weights, parameters, plans)
    return groups
