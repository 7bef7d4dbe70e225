"""Pushes revocations to those whom they concern, soon after they are on record."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from sqlalchemy import Connection

from services.attestor.callers import Callers, Proof
from tensorguard.errors import UnavailableError
from tensorguard.evidence.release import RevocationNotice, watch_transcript
from tensorguard.store.database import Database
from tensorguard.store.revocations import Revocation, RevocationKind, holders_of, release_of_key, revocations

LOOK_SECONDS = 0.5


class RevocationWatch:
    """Follows the revocations in the database, whichever process writes them."""

    def __init__(
        self, database: Database, callers: Callers, *, most: int = 64, clock: Callable[[], float] = time.time
    ) -> None:
        """`most`: streams at a time; each holds a thread of the server."""
        self._database = database
        self._callers = callers
        self._free = threading.BoundedSemaphore(most)
        self._clock = clock

    def follow(self, proof: Proof, after: int, is_active: Callable[[], bool]) -> Iterator[RevocationNotice]:
        """Notices for the caller's tenant behind number `after`, until the token expires or the caller has gone.

        Raises what the proof is refused with, and UnavailableError when too many watch.
        """
        caller = self._callers.identify(proof)
        caller.identity.verify(
            proof.signature,
            watch_transcript(caller.attestor_thumbprint, proof.token, after, proof.request_nonce),
        )
        with self._place():
            while is_active() and self._clock() < caller.expires_at:
                with self._database.reading() as connection:
                    found = revocations(connection, after=after)
                    notices = [self._notice(connection, item, caller.tenant) for item in found]
                for item in found:
                    after = item.number
                yield from (notice for notice in notices if notice is not None)
                time.sleep(LOOK_SECONDS)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if not self._free.acquire(blocking=False):
            raise UnavailableError("too many workloads watch revocations; try again later")
        try:
            yield
        finally:
            self._free.release()

    @staticmethod
    def _notice(connection: Connection, revocation: Revocation, tenant: str) -> RevocationNotice | None:
        """What the tenant may know of a revocation, None for nothing: other tenants' packages are not its business."""
        subject = revocation.subject
        if subject.kind in (RevocationKind.PACKAGE, RevocationKind.VERSION, RevocationKind.KEY):
            release: tuple[str, str, int] | None = (subject.tenant, subject.package_id, subject.sequence)
            if subject.kind is RevocationKind.KEY:
                release = release_of_key(connection, subject.value)
            if release is None or release[0] != tenant:
                return None
            return RevocationNotice(revocation.number, package_id=release[1], sequence=release[2])
        holders = holders_of(connection, subject, tenant)
        return RevocationNotice(revocation.number, workloads=tuple(holders)) if holders else None
