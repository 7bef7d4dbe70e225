"""The engines that `benchmarks/he_core.py` compares, each behind the same four calls."""
