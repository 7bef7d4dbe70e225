"""Who calls: a token of this attestor, under the policy that is in force."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection

from tensorguard.errors import InvalidInputError, TokenError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.ear import TokenVerifier
from tensorguard.evidence.policy import Policy
from tensorguard.evidence.release import REQUEST_NONCE_BYTES
from tensorguard.evidence.result import AttestationResult
from tensorguard.evidence.tls import check_channel
from tensorguard.rpc.tls import Peer
from tensorguard.store.database import Database
from tensorguard.store.revocations import check_token_not_revoked
from tensorguard.store.signing_keys import SigningKeys


@dataclass(frozen=True, slots=True)
class Proof:
    """What shows that a request comes from an attested workload."""

    token: str
    signature: bytes
    request_nonce: bytes
    connection: Peer | None = None
    """Whose certificate the connection has; None without TLS."""


class Callers:
    """Verifies tokens. The signature over the request is for whoever knows its transcript."""

    def __init__(
        self, keys: SigningKeys, policy: Policy, database: Database, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._keys = keys
        self._policy = policy
        self._database = database
        self._clock = clock

    def identify(self, proof: Proof, role: Role | None = None) -> AttestationResult:
        """What the token says.

        Raises TokenError, PermissionDeniedError (another role), AuthenticationError (another connection), RevokedError.
        """
        if len(proof.request_nonce) != REQUEST_NONCE_BYTES:
            raise InvalidInputError(f"a request nonce has {REQUEST_NONCE_BYTES} bytes")
        caller = TokenVerifier(self._keys.valid(), clock=self._clock).verify(proof.token, role=role)
        check_channel(proof.connection, caller)
        if caller.policy_sha256 != self._policy.sha256:
            raise TokenError("the policy has changed since this token was issued; attest again")
        with self._database.reading() as connection:
            self.check_not_revoked(connection, caller)
        return caller

    @staticmethod
    def check_not_revoked(connection: Connection, caller: AttestationResult) -> None:
        """Raises RevokedError when what the token rests on is revoked by now, TokenError when it is not known here."""
        check_token_not_revoked(connection, caller.token_id, caller.identity.thumbprint)
