"""Rotation of the authority that certifies services."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # The one of before has issued, and been trusted alone, since it was made.
    for name in ("issues_from", "alone_from"):
        op.add_column("authority", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    op.execute("UPDATE authority SET issues_from = created_at, alone_from = created_at")
