"""Opened adapters: encoded weights in memory, with the meter and lease they are served under."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.he_lora.metering import TokenMeter
from tensorguard.ckks.parameters import ParameterSet
from tensorguard.engines import EncodedWeights
from tensorguard.errors import LeaseExpiredError, NotFoundError, TenSafeError
from tensorguard.evidence.workload import Workload
from tensorguard.observability.metrics import HE_ADAPTER_MEMORY
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2 as pb

LEASE_OVER = "the lease on this adapter is over: see in the coprocessor's log why the attestor did not renew it"


@dataclass(frozen=True, slots=True, eq=False)
class ServedAdapter:
    """One adapter release."""

    name: str
    tenant: str
    digest: str
    """SHA-256 of the manifest, hex."""
    sequence: int
    base_model: str
    parameters: ParameterSet
    envelope: bytes = field(repr=False)
    """Manifest and signatures, as the host receives them."""
    basis: bytes = field(repr=False)
    """Safetensors bytes of U; empty in full mode."""
    groups: Mapping[tuple[int, str], EncodedWeights] = field(repr=False)
    meter: TokenMeter
    workload: Workload
    """The attested identity that the key was released to."""

    @property
    def nbytes(self) -> int:
        """Bytes of transformed weights."""
        return sum(group.nbytes for group in self.groups.values())

    def group(self, layer: int, group: str) -> EncodedWeights:
        """Raises NotFoundError when the adapter has nothing for this group."""
        try:
            return self.groups[layer, group]
        except KeyError:
            raise NotFoundError("the adapter has no weights for this layer and group") from None

    def summary(self) -> pb.Adapter:
        """What anyone may know about it."""
        return pb.Adapter(
            name=self.name,
            tenant=self.tenant,
            digest=self.digest,
            sequence=self.sequence,
            lease_expires_at=self.meter.terms.expires_at,
            tokens_left=self.meter.left,
            parameter_set=self.parameters.name,
            base_model=self.base_model,
        )


class AdapterStore:
    """Adapters by name. Dropping one forgets its weights, not why; evaluations that run finish."""

    def __init__(self) -> None:
        self._adapters: dict[str, ServedAdapter] = {}
        self._dropped: dict[str, TenSafeError] = {}
        self._lock = threading.Lock()
        self._charged_before = 0

    def put(self, adapter: ServedAdapter) -> None:
        """Serve an adapter, in place of one of the same name."""
        with self._lock:
            old = self._adapters.get(adapter.name)
            if old is not None:
                self._charged_before += old.meter.total
            self._adapters[adapter.name] = adapter
            self._dropped.pop(adapter.name, None)
            HE_ADAPTER_MEMORY.labels(adapter.name).set(adapter.nbytes)

    def get(self, name: str) -> ServedAdapter:
        """Raises NotFoundError for an unknown adapter, LeaseExpiredError for one whose lease is over, and for a dropped
        one the error that it was dropped with.
        """
        with self._lock:
            adapter, dropped = self._adapters.get(name), self._dropped.get(name)
        if dropped is not None:
            raise type(dropped)(dropped.message)
        if adapter is None:
            served = ", ".join(known.name for known in self.all()) or "none"
            raise NotFoundError(f"adapter {name!r:.100} is not served here (served: {served}): correct the name")
        if adapter.meter.expired:
            raise LeaseExpiredError(LEASE_OVER)
        return adapter

    def drop(self, name: str, cause: TenSafeError) -> None:
        """Forget an adapter. Who asks for it from now on gets `cause`; a later cause replaces an earlier one."""
        with self._lock:
            self._dropped[name] = cause
            old = self._adapters.pop(name, None)
            if old is not None:
                self._charged_before += old.meter.total
                HE_ADAPTER_MEMORY.remove(name)

    def all(self) -> list[ServedAdapter]:
        """The adapters, by name."""
        with self._lock:
            return [self._adapters[name] for name in sorted(self._adapters)]

    @property
    def tokens_charged(self) -> int:
        """Tokens charged since start, over all adapters."""
        with self._lock:
            return self._charged_before + sum(adapter.meter.total for adapter in self._adapters.values())
