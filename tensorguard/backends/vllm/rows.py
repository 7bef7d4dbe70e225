"""Which token rows of a forward pass belong to which adapter.

A batch of vLLM's V1 runner is one [tokens, d] matrix in which each request owns consecutive rows: prefill
chunks many, decoding requests one. Requests without an adapter are simply not mentioned in the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ADAPTER_ARGUMENT = "tensafe_adapter"
"""Key in `SamplingParams.extra_args` that names a request's adapter. Only the server side sets it."""


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of one adapter in one forward pass."""

    adapter: str
    """Its key."""
    request_ids: tuple[str, ...]
    count: int
    index: slice | torch.Tensor
    """A slice where the rows are consecutive (a view costs nothing), otherwise int64 row numbers."""


def adapter_key(name: str, digest: str) -> str:
    """What an adapter is called inside the engine: users' name and release.

    A request carries the key, so that it stays on one release for its whole life while the name moves on.
    """
    return f"{name}@{digest[:16]}"


def adapter_of(extra_args: Mapping[str, Any] | None) -> str | None:
    """The key of the adapter that a request names, or None for the base model."""
    if not extra_args:
        return None
    key = extra_args.get(ADAPTER_ARGUMENT)
    return None if key is None else str(key)


def map_rows(
    request_ids: Sequence[str],
    adapters: Sequence[str | None],
    row_starts: np.ndarray,
    device: torch.device,
) -> list[AdapterRows]:
    """Group the rows of a batch by adapter, in order of first appearance.

    Request i owns rows `row_starts[i] : row_starts[i + 1]`; `row_starts` is int[len(request_ids) + 1] or
    longer. Rows past the last request (padding) belong to nobody.
    """
    owners: dict[str, list[int]] = {}
    for position, adapter in enumerate(adapters):
        if adapter is not None:
            owners.setdefault(adapter, []).append(position)
    return [_rows_of(adapter, positions, request_ids, row_starts, device) for adapter, positions in owners.items()]


def _rows_of(
    adapter: str,
    positions: list[int],
    request_ids: Sequence[str],
    row_starts: np.ndarray,
    device: torch.device,
) -> AdapterRows:
    ids = tuple(request_ids[position] for position in positions)
    first, last = positions[0], positions[-1]
    if last - first + 1 == len(positions):
        begin, end = int(row_starts[first]), int(row_starts[last + 1])
        return AdapterRows(adapter, ids, end - begin, slice(begin, end))
    rows = np.concatenate([np.arange(row_starts[p], row_starts[p + 1], dtype=np.int64) for p in positions])
    return AdapterRows(adapter, ids, len(rows), torch.from_numpy(rows).to(device))
