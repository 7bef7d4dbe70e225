from __future__ import annotations

from tensorguard.ckks import compile_kernels, compiled, kernels


def test_the_cache_is_bound_to_the_whole_engines_source() -> None:
    """numba alone would keep a kernel whose inlined helper in another module has changed."""
    compile_kernels()
    index = kernels.evaluate._cache._cache_file
    assert index._source_stamp == compiled._SOURCE
    if index._load_index():
        index._source_stamp = "another source"
        try:
            assert index._load_index() == {}
        finally:
            index._source_stamp = compiled._SOURCE
