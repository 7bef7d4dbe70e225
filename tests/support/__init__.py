"""Helpers shared by tests: fakes live here, never in the product."""
