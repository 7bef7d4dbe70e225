"""Who calls: a token of this attestor, under the policy that is in force."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection

from tensorguard.errors import InvalidInputError, TokenError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.ear import TokenVerifier
from tensorguard.evidence.keys import AttestorKey
from tensorguard.evidence.policy import Policy
from tensorguard.evidence.release import REQUEST_NONCE_BYTES
from tensorguard.evidence.result import AttestationResult
from tensorguard.store.database import Database
from tensorguard.store.revocations import check_token_not_revoked


@dataclass(frozen=True, slots=True)
class Proof:
    """What shows that a request comes from an attested workload."""

    token: str
    signature: bytes
    request_nonce: bytes


class Callers:
    """Verifies tokens. The signature over the request is for whoever knows its transcript."""

    def __init__(
        self, key: AttestorKey, policy: Policy, database: Database, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._policy = policy
        self._database = database
        self._verifier = TokenVerifier(key.key_set(), clock=clock)
        self.attestor_thumbprint = key.thumbprint

    def identify(self, proof: Proof, role: Role | None = None) -> AttestationResult:
        """What the token says. Raises TokenError, PermissionDeniedError (another role), RevokedError."""
        if len(proof.request_nonce) != REQUEST_NONCE_BYTES:
            raise InvalidInputError(f"a request nonce has {REQUEST_NONCE_BYTES} bytes")
        caller = self._verifier.verify(proof.token, role=role)
        if caller.policy_sha256 != self._policy.sha256:
            raise TokenError("the policy has changed since this token was issued; attest again")
        with self._database.reading() as connection:
            self.check_not_revoked(connection, caller)
        return caller

    @staticmethod
    def check_not_revoked(connection: Connection, caller: AttestationResult) -> None:
        """Raises RevokedError when what the token rests on is revoked by now, TokenError when it is not known here."""
        check_token_not_revoked(connection, caller.token_id, caller.identity.thumbprint)
