"""The engine on OpenFHE's CKKS: another implementation that an unmodified host can talk to. See docs/engines.md."""
