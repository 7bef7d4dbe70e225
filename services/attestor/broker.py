"""The key broker: releases content keys to attested coprocessors, under leases."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection

from services.attestor.callers import Callers, Proof
from services.attestor.decisions import Decision, Decisions
from tensorguard.errors import (
    InvalidInputError,
    LeaseExpiredError,
    PermissionDeniedError,
    PolicyError,
)
from tensorguard.evidence.claims import Role
from tensorguard.evidence.policy import Policy
from tensorguard.evidence.release import (
    LeaseTerms,
    Release,
    release_transcript,
    renew_transcript,
    sealed_key_info,
)
from tensorguard.evidence.result import AttestationResult
from tensorguard.package.names import check_name, check_sequence
from tensorguard.store.database import Database
from tensorguard.store.leases import Limits, find_lease, open_lease, renew_lease
from tensorguard.store.packages import PackageKeyRegistry, RegisteredPackage, newest_sequence
from tensorguard.store.revocations import check_release_not_revoked

MAX_TOKENS = 2**53 - 1
MAX_LEASE_ID = 64


@dataclass(frozen=True, slots=True)
class SealedKey:
    """A content key that only the attested HPKE key opens."""

    sealed: bytes
    terms: LeaseTerms


class KeyBroker:
    """Decides who gets a package key, for how long and for how many tokens."""

    def __init__(
        self,
        policy: Policy,
        callers: Callers,
        registry: PackageKeyRegistry,
        database: Database,
        decisions: Decisions,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._policy = policy
        self._callers = callers
        self._registry = registry
        self._database = database
        self._decisions = decisions
        self._clock = clock

    def release(
        self, proof: Proof, *, package_id: str, sequence: int, manifest_digest: bytes, tokens_wanted: int, peer: str
    ) -> SealedKey:
        """The content key of this release, sealed to the caller. Asking again gives the same lease."""
        with self._decisions.deciding("release", peer) as record:
            record.update(package_id=package_id, sequence=sequence, manifest_digest=manifest_digest.hex()[:64])
            check_name(package_id, "package id")
            check_sequence(sequence)
            if len(manifest_digest) != 32:
                raise InvalidInputError("a manifest digest has 32 bytes")
            _check_tokens(tokens_wanted)
            caller = self._identify(proof, record)
            release = Release(caller.tenant, package_id, sequence, manifest_digest)
            caller.identity.verify(
                proof.signature,
                release_transcript(
                    caller.attestor_thumbprint, proof.token, release, tokens_wanted, proof.request_nonce
                ),
            )
            record.authenticated = True
            if caller.package_id != package_id:
                raise PermissionDeniedError("the token is for another package; attest for this one")
            package = self._package(release)
            with record.accepting() as connection:
                self._check_now(connection, caller, package)
                newest = newest_sequence(connection, release.tenant, release.package_id)
                if newest is not None and sequence < newest:
                    raise PermissionDeniedError(f"sequence {sequence} was replaced by {newest}; use the newest package")
                terms = open_lease(
                    connection,
                    release,
                    token_id=caller.token_id,
                    holder=caller.identity.thumbprint,
                    tokens_wanted=tokens_wanted,
                    limits=self._limits(package),
                    now=int(self._clock()),
                )
                _record_terms(record, terms)
            # After the commit: if sealing fails, tokens are lost, which is safe; nothing is ever sealed unrecorded.
            sealed = caller.identity.seal(
                package.content_key,
                sealed_key_info(
                    caller.attestor_thumbprint, caller.identity.hpke_suite, release, proof.request_nonce, terms
                ),
            )
        return SealedKey(sealed, terms)

    def renew(self, proof: Proof, *, lease_id: str, tokens_used: int, tokens_wanted: int, peer: str) -> LeaseTerms:
        """Extend a lease for its holder. The same request again gives the same answer."""
        with self._decisions.deciding("renew", peer) as record:
            record.update(lease_id=lease_id[:MAX_LEASE_ID])
            if not 0 < len(lease_id) <= MAX_LEASE_ID:
                raise InvalidInputError("the lease id is malformed")
            _check_tokens(tokens_wanted)
            _check_tokens(tokens_used)
            caller = self._identify(proof, record)
            caller.identity.verify(
                proof.signature,
                renew_transcript(
                    caller.attestor_thumbprint,
                    proof.token,
                    lease_id,
                    tokens_used,
                    tokens_wanted,
                    proof.request_nonce,
                ),
            )
            record.authenticated = True
            with self._database.reading() as reading:
                lease = find_lease(reading, lease_id)
            release = lease.release
            if (lease.holder, release.tenant, release.package_id) != (
                caller.identity.thumbprint,
                caller.tenant,
                caller.package_id,
            ):
                raise PermissionDeniedError("this lease belongs to another workload")
            record.update(package_id=release.package_id, sequence=release.sequence, tokens_used=tokens_used)
            package = self._package(release)
            with record.accepting() as connection:
                self._check_now(connection, caller, package)
                terms = renew_lease(
                    connection,
                    lease_id,
                    tokens_used=tokens_used,
                    tokens_wanted=tokens_wanted,
                    request_nonce=proof.request_nonce,
                    limits=self._limits(package),
                    now=int(self._clock()),
                )
                _record_terms(record, terms)
        return terms

    def _identify(self, proof: Proof, record: Decision) -> AttestationResult:
        caller = self._callers.identify(proof, Role.COPROCESSOR)
        record.update(
            jti=caller.token_id,
            holder=caller.identity.thumbprint,
            tenant=caller.tenant,
            evidence_kind=caller.kind.value,
            hpke_suite=caller.identity.hpke_suite.value,
            policy_sha256=caller.policy_sha256,
        )
        return caller

    def _package(self, release: Release) -> RegisteredPackage:
        package = self._registry.lookup(
            release.tenant, release.package_id, release.sequence, release.manifest_digest.hex()
        )
        if self._clock() >= package.expires_at:
            raise LeaseExpiredError("the package has expired; pack a new sequence")
        if package.release_policy_sha256 not in ("", self._policy.sha256):
            raise PolicyError(
                f"the package may only be used under the policy with SHA-256 {package.release_policy_sha256}: give the "
                "attestor that policy, or pack the adapter again"
            )
        return package

    def _check_now(self, connection: Connection, caller: AttestationResult, package: RegisteredPackage) -> None:
        """What may have changed since the request came in, in the transaction that decides."""
        self._callers.check_not_revoked(connection, caller)
        release = Release(package.tenant, package.package_id, package.sequence, bytes.fromhex(package.manifest_digest))
        check_release_not_revoked(connection, release, package.key_id)

    def _limits(self, package: RegisteredPackage) -> Limits:
        own = self._policy.lease
        return Limits(
            lease_seconds=own.seconds,
            tokens_per_grant=own.tokens_per_grant,
            tokens_per_release=min(own.tokens_per_release, package.token_budget),
            not_after=package.expires_at,
        )


def _record_terms(record: Decision, terms: LeaseTerms) -> None:
    record.update(lease_id=terms.lease_id, lease_expires_at=terms.expires_at, tokens_granted=terms.tokens_granted)


def _check_tokens(count: int) -> None:
    if not 0 <= count <= MAX_TOKENS:
        raise InvalidInputError("a number of tokens must be from 0 to 2^53 - 1")
