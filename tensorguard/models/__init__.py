"""Base models: prepare one from an installed package, tell one from another, run one in plaintext."""
