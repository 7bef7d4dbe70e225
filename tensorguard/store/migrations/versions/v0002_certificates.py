"""Rotation of signing keys, the authority of service certificates, and enrolment secrets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # Keys of before have signed since they were made.
    op.add_column("signing_keys", sa.Column("signs_from", sa.BigInteger, nullable=False, server_default="0"))
    op.execute("UPDATE signing_keys SET signs_from = created_at")
    op.create_table(
        "authority",
        sa.Column("certificate", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("wrapped_key", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "enrolments",
        sa.Column("sha256", sa.Text, primary_key=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
    )
