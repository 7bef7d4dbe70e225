from __future__ import annotations

from tensorguard.ckks import compiled, kernels
from tensorguard.session.warm_up import warm_up


def test_the_cache_is_bound_to_the_whole_engines_source() -> None:
    """numba alone would keep a kernel whose inlined helper in another module has changed."""
    warm_up()
    index = kernels.evaluate._cache._cache_file
    assert index._source_stamp == compiled._SOURCE
    if index._load_index():
        index._source_stamp = "another source"
        try:
            assert index._load_index() == {}
        finally:
            index._source_stamp = compiled._SOURCE
