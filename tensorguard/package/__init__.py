"""Sealed adapter packages (`.tssp` v1, docs/tssp.md) and the registry of their content keys."""
