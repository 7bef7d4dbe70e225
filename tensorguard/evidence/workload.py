"""An attested workload: its identity, and a token that is always good for a while."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from tensorguard.errors import TokenError
from tensorguard.evidence.claims import Role
from tensorguard.evidence.client import AttestorClient, ReleasedKey
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.platform import GpuPlatform, Platform
from tensorguard.evidence.release import LeaseTerms, Release, RevocationNotice

REFRESH_SECONDS = 60.0


class Workload:
    """One role of a process for one tenant (and package). Attests at first use, and again in time."""

    def __init__(
        self,
        client: AttestorClient,
        identity: WorkloadIdentity,
        platform: Platform,
        *,
        role: Role,
        tenant: str,
        package_id: str = "",
        gpus: GpuPlatform | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.client = client
        self.identity = identity
        self.role = role
        self.tenant = tenant
        self.package_id = package_id
        self.evidence_kind = platform.kind
        self._platform = platform
        self._gpus = gpus
        self._clock = clock
        self._lock = threading.Lock()
        self._token = ""
        self._expires_at = 0
        self._policy_sha256 = ""

    def token(self) -> str:
        """A token with a minute or a fifth of its life left. Raises what `AttestorClient.attest` does."""
        with self._lock:
            if self._clock() >= self._expires_at:
                token = self.client.attest(
                    self.identity,
                    self._platform,
                    role=self.role,
                    tenant=self.tenant,
                    package_id=self.package_id,
                    gpus=self._gpus,
                )
                result = self.client.verifier().verify(token)
                life = result.expires_at - result.issued_at
                self._token, self._policy_sha256 = token, result.policy_sha256
                self._expires_at = int(result.expires_at - min(REFRESH_SECONDS, life / 5))
            return self._token

    def policy_sha256(self) -> str:
        """SHA-256 (hex) of the policy that the current token was issued under. Raises what `token` does."""
        self.token()
        return self._policy_sha256

    def release_key(self, release: Release, *, tokens_wanted: int) -> ReleasedKey:
        """`AttestorClient.release_key` under the current token."""
        with self._present() as token:
            return self.client.release_key(self.identity, token, release, tokens_wanted=tokens_wanted)

    def watch_revocations(self, after: int) -> Iterator[RevocationNotice]:
        """`AttestorClient.watch_revocations` under the current token."""
        with self._present() as token:
            yield from self.client.watch_revocations(self.identity, token, after)

    def renew(self, lease_id: str, *, tokens_used: int, tokens_wanted: int) -> LeaseTerms:
        """`AttestorClient.renew` under the current token."""
        with self._present() as token:
            return self.client.renew(
                self.identity, token, lease_id, tokens_used=tokens_used, tokens_wanted=tokens_wanted
            )

    @contextlib.contextmanager
    def _present(self) -> Iterator[str]:
        """The current token. One that the attestor does not take, as under another policy, is not used again."""
        token = self.token()
        try:
            yield token
        except TokenError:
            with self._lock:
                if self._token == token:
                    self._expires_at = 0
            raise
