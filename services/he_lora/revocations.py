"""What revocations end at a coprocessor, at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.he_lora.leases import LeaseKeeper
from services.he_lora.sessions import SessionRegistry
from tensorguard.errors import RevokedError
from tensorguard.evidence.release import RevocationNotice


@dataclass(frozen=True, slots=True)
class Revocations:
    """Adapters and sessions that a revocation may concern."""

    thumbprint: str
    """Of the coprocessor's own attested key."""
    keepers: Sequence[LeaseKeeper]
    sessions: SessionRegistry

    def apply(self, notice: RevocationNotice) -> None:
        """Drop the adapters and close the sessions that a notice concerns."""
        self.sessions.revoke(notice.workloads)
        for keeper in self.keepers:
            if self.thumbprint in notice.workloads:
                keeper.revoke(RevokedError("this coprocessor was revoked; ask whoever runs the attestor"))
            elif keeper.serves(notice.package_id, notice.sequence):
                keeper.revoke(RevokedError("this adapter release was revoked by its owner"))
