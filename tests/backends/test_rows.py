"""Which rows belong to whom, against a row-by-row account."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorguard.backends.vllm.rows import ADAPTER_ARGUMENT, adapter_of, map_rows

CPU = torch.device("cpu")
REQUESTS = st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.integers(1, 9)), max_size=12)


@given(REQUESTS, st.integers(0, 5))
def test_every_row_has_exactly_its_owner(requests: list[tuple[str | None, int]], padding: int) -> None:
    adapters = [adapter for adapter, _ in requests]
    counts = [count for _, count in requests]
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int32), np.full(3, 10_000)]).astype(np.int32)
    ids = [f"r{i}" for i in range(len(requests))]
    owners = [adapter for adapter, count in requests for _ in range(count)] + [None] * padding
    rows = torch.arange(len(owners))
    mapped = map_rows(ids, adapters, starts, CPU)
    assert [m.adapter for m in mapped] == list(dict.fromkeys(a for a in adapters if a is not None))
    for m in mapped:
        assert rows[m.index].tolist() == [i for i, owner in enumerate(owners) if owner == m.adapter]
        assert m.count == len(rows[m.index])
        assert m.request_ids == tuple(i for i, a in zip(ids, adapters, strict=True) if a == m.adapter)


def test_consecutive_rows_are_a_view() -> None:
    (mapped,) = map_rows(["x", "y", "z"], [None, "a", "a"], np.array([0, 3, 4, 9]), CPU)
    assert mapped.index == slice(3, 9)
    x = torch.zeros(9, 4)
    assert x[mapped.index].data_ptr() == x[3:].data_ptr()


def test_only_our_argument_names_an_adapter() -> None:
    assert adapter_of(None) is None
    assert adapter_of({}) is None
    assert adapter_of({"other": 1}) is None
    assert adapter_of({ADAPTER_ARGUMENT: "a", "other": 1}) == "a"
