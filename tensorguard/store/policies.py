"""Every policy that was in force, with its versions."""

from __future__ import annotations

from sqlalchemy import Connection, func, select

from tensorguard.crypto import canonical
from tensorguard.evidence.policy import Policy
from tensorguard.store.schema import POLICIES


def policy_version(connection: Connection, policy: Policy, now: int) -> int:
    """The number of this policy among those of its id, from 1; one that is new is kept with the next number."""
    known: int | None = connection.execute(
        select(POLICIES.c.version).where(POLICIES.c.sha256 == policy.sha256)
    ).scalar()
    if known is not None:
        return known
    newest = connection.execute(select(func.max(POLICIES.c.version)).where(POLICIES.c.policy_id == policy.id)).scalar()
    version = (newest or 0) + 1
    connection.execute(
        POLICIES.insert().values(
            policy_id=policy.id,
            version=version,
            sha256=policy.sha256,
            document=canonical.dumps(policy.model_dump(mode="json")).decode(),
            loaded_at=now,
        )
    )
    return version
