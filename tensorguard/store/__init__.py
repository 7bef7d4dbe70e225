"""The attestor's state: one database (SQLite or PostgreSQL), what its secrets are wrapped under, and its audit log."""
