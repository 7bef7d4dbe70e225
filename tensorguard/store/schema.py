"""The tables as the code reads and writes them; `migrations` makes them (a test holds both against each other)."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, Table, Text

VERSION = "0003"
"""Newest migration: the schema that this code works with."""

_METADATA = MetaData()


def _table(name: str, *columns: Column[str] | Column[int] | Column[bytes]) -> Table:
    return Table(name, _METADATA, *columns)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _integer(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _release() -> tuple[Column[str] | Column[int], ...]:
    return _text("tenant"), _text("package_id"), _integer("sequence")


SETTINGS = _table("settings", _text("name"), _text("value"))
"""What is true of the whole database: `key_encryption_key` is the id of the key that secrets are wrapped under."""

PACKAGES = _table(
    "packages",
    *_release(),
    _text("manifest_digest"),
    _text("key_id"),
    _integer("token_budget"),
    _integer("expires_at"),
    _integer("registered_at"),
    _text("release_policy_sha256"),
    Column("wrapped_key", LargeBinary, nullable=False),
)
SIGNING_KEYS = _table(
    "signing_keys",
    _text("thumbprint"),
    _integer("created_at"),
    Column("wrapped_key", LargeBinary, nullable=False),
    _integer("signs_from"),
)
"""A key verifies from `created_at`, and signs from `signs_from` until that of the next one."""
AUTHORITY = _table(
    "authority",
    Column("certificate", LargeBinary, nullable=False),
    _integer("created_at"),
    Column("wrapped_key", LargeBinary, nullable=False),
    _integer("issues_from"),
    _integer("alone_from"),
)
"""Certificate (DER) and key of each authority that certifies services. One issues from `issues_from` until that of the
next one, and is trusted until the next one's `alone_from`."""
ENROLMENTS = _table("enrolments", _text("sha256"), _text("role"), _text("tenant"), _integer("expires_at"))
"""Secrets that are good for one certificate each."""
POLICIES = _table(
    "policies", _text("policy_id"), _integer("version"), _text("sha256"), _text("document"), _integer("loaded_at")
)
NONCES = _table("nonces", _text("sha256"), _integer("expires_at"))
ATTESTATIONS = _table("attestations", _text("token_id"), _text("holder"), _text("tenant"), _integer("expires_at"))
ATTESTED_VALUES = _table("attested_values", _text("token_id"), _text("kind"), _text("value"))
"""Measurements and chips behind a token, so that revoking one ends what rests on it."""
BUDGETS = _table("budgets", *_release(), _integer("granted"))
LEASES = _table(
    "leases",
    _text("lease_id"),
    _text("token_id"),
    _text("holder"),
    *_release(),
    _text("manifest_digest"),
    _integer("expires_at"),
    _integer("granted"),
    _integer("used"),
)
RENEWALS = _table("renewals", _text("request"), _text("lease_id"), _integer("expires_at"), _integer("granted"))
REVOCATIONS = _table(
    "revocations",
    _integer("number"),
    _text("kind"),
    *_release(),
    _text("value"),
    _text("note"),
    _integer("revoked_at"),
)
AUDIT = _table("audit", _integer("record"), _text("hash"), _text("line"))

TABLES = dict(_METADATA.tables)
