"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_RELEASE = ("tenant", "package_id", "sequence")


def _release() -> list[sa.Column[object]]:
    return [
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("package_id", sa.Text, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
    ]


def upgrade() -> None:
    op.create_table(
        "settings", sa.Column("name", sa.Text, primary_key=True), sa.Column("value", sa.Text, nullable=False)
    )
    op.create_table(
        "packages",
        *_release(),
        sa.Column("manifest_digest", sa.Text, nullable=False, unique=True),
        sa.Column("key_id", sa.Text, nullable=False, unique=True),
        sa.Column("token_budget", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("registered_at", sa.BigInteger, nullable=False),
        sa.Column("release_policy_sha256", sa.Text, nullable=False),
        sa.Column("wrapped_key", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint(*_RELEASE),
    )
    op.create_table(
        "signing_keys",
        sa.Column("thumbprint", sa.Text, primary_key=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("wrapped_key", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "policies",
        sa.Column("policy_id", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False, unique=True),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("loaded_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("policy_id", "version"),
    )
    op.create_table(
        "nonces",
        sa.Column("sha256", sa.Text, primary_key=True),
        sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
    )
    op.create_table(
        "attestations",
        sa.Column("token_id", sa.Text, primary_key=True),
        sa.Column("holder", sa.Text, nullable=False, index=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
    )
    op.create_table(
        "attested_values",
        sa.Column("token_id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("value", sa.Text, nullable=False, index=True),
        sa.PrimaryKeyConstraint("token_id", "kind", "value"),
    )
    op.create_table(
        "budgets",
        *_release(),
        sa.Column("granted", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint(*_RELEASE),
        sa.CheckConstraint("granted >= 0"),
    )
    op.create_table(
        "leases",
        sa.Column("lease_id", sa.Text, primary_key=True),
        sa.Column("token_id", sa.Text, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        *_release(),
        sa.Column("manifest_digest", sa.Text, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
        sa.Column("granted", sa.BigInteger, nullable=False),
        sa.Column("used", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("token_id", *_RELEASE),
    )
    op.create_table(
        "renewals",
        sa.Column("request", sa.Text, primary_key=True),
        sa.Column("lease_id", sa.Text, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
        sa.Column("granted", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "revocations",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("package_id", sa.Text, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("revoked_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("kind", "tenant", "package_id", "sequence", "value"),
    )
    op.create_table(
        "audit",
        sa.Column("record", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("line", sa.Text, nullable=False),
    )
