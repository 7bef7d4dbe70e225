"""The key broker: releases content keys to attested coprocessors, under leases."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from services.attestor.decisions import decision
from services.attestor.leases import LeaseBook, Limits
from tensorguard.errors import (
    InvalidInputError,
    LeaseExpiredError,
    PermissionDeniedError,
    TokenError,
)
from tensorguard.evidence.audit import AuditLog
from tensorguard.evidence.claims import Role
from tensorguard.evidence.ear import TokenVerifier
from tensorguard.evidence.keys import AttestorKey
from tensorguard.evidence.policy import Policy
from tensorguard.evidence.release import (
    REQUEST_NONCE_BYTES,
    LeaseTerms,
    Release,
    release_transcript,
    renew_transcript,
    sealed_key_info,
)
from tensorguard.evidence.result import AttestationResult
from tensorguard.package.names import check_name, check_sequence
from tensorguard.package.registry import PackageKeyRegistry, RegisteredPackage

MAX_TOKENS = 2**53 - 1
MAX_LEASE_ID = 64


@dataclass(frozen=True, slots=True)
class Proof:
    """What shows that a request comes from an attested workload."""

    token: str
    signature: bytes
    request_nonce: bytes


@dataclass(frozen=True, slots=True)
class SealedKey:
    """A content key that only the attested HPKE key opens."""

    sealed: bytes
    terms: LeaseTerms


class KeyBroker:
    """Decides who gets a package key, for how long and for how many tokens."""

    def __init__(
        self,
        key: AttestorKey,
        policy: Policy,
        registry: PackageKeyRegistry,
        leases: LeaseBook,
        audit: AuditLog,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._key = key
        self._policy = policy
        self._registry = registry
        self._leases = leases
        self._audit = audit
        self._clock = clock
        self._verifier = TokenVerifier(key.key_set(), clock=clock)

    def release(
        self, proof: Proof, *, package_id: str, sequence: int, manifest_digest: bytes, tokens_wanted: int
    ) -> SealedKey:
        """The content key of this release, sealed to the caller. Asking again gives the same lease."""
        with decision(self._audit, "release") as record:
            record.update(package_id=package_id, sequence=sequence, manifest_digest=manifest_digest.hex()[:64])
            check_name(package_id, "package id")
            check_sequence(sequence)
            if len(manifest_digest) != 32:
                raise InvalidInputError("a manifest digest has 32 bytes")
            _check_tokens(tokens_wanted)
            caller = self._caller(proof, record)
            release = Release(caller.tenant, package_id, sequence, manifest_digest)
            caller.identity.verify(
                proof.signature,
                release_transcript(self._key.thumbprint, proof.token, release, tokens_wanted, proof.request_nonce),
            )
            if caller.package_id != package_id:
                raise PermissionDeniedError("the token is for another package; attest for this one")
            package = self._package(release)
            newest = self._registry.newest_sequence(release.tenant, release.package_id)
            if newest is not None and sequence < newest:
                raise PermissionDeniedError(f"sequence {sequence} was replaced by {newest}; use the newest package")
            terms = self._leases.open_lease(
                release,
                token_id=caller.token_id,
                holder=caller.identity.thumbprint,
                tokens_wanted=tokens_wanted,
                limits=self._limits(package),
                now=int(self._clock()),
            )
            sealed = caller.identity.seal(
                package.content_key,
                sealed_key_info(self._key.thumbprint, release, proof.request_nonce, terms),
            )
            _record_terms(record, terms)
        return SealedKey(sealed, terms)

    def renew(self, proof: Proof, *, lease_id: str, tokens_used: int, tokens_wanted: int) -> LeaseTerms:
        """Extend a lease for its holder. The same request again gives the same answer."""
        with decision(self._audit, "renew") as record:
            record.update(lease_id=lease_id[:MAX_LEASE_ID])
            if not 0 < len(lease_id) <= MAX_LEASE_ID:
                raise InvalidInputError("the lease id is malformed")
            _check_tokens(tokens_wanted)
            _check_tokens(tokens_used)
            caller = self._caller(proof, record)
            caller.identity.verify(
                proof.signature,
                renew_transcript(
                    self._key.thumbprint,
                    proof.token,
                    lease_id,
                    tokens_used,
                    tokens_wanted,
                    proof.request_nonce,
                ),
            )
            lease = self._leases.find(lease_id)
            release = lease.release
            if (lease.holder, release.tenant, release.package_id) != (
                caller.identity.thumbprint,
                caller.tenant,
                caller.package_id,
            ):
                raise PermissionDeniedError("this lease belongs to another workload")
            record.update(package_id=release.package_id, sequence=release.sequence, tokens_used=tokens_used)
            terms = self._leases.renew(
                lease_id,
                tokens_used=tokens_used,
                tokens_wanted=tokens_wanted,
                request_nonce=proof.request_nonce,
                limits=self._limits(self._package(release)),
                now=int(self._clock()),
            )
            _record_terms(record, terms)
        return terms

    def _caller(self, proof: Proof, record: dict[str, object]) -> AttestationResult:
        if len(proof.request_nonce) != REQUEST_NONCE_BYTES:
            raise InvalidInputError(f"a request nonce has {REQUEST_NONCE_BYTES} bytes")
        caller = self._verifier.verify(proof.token, role=Role.COPROCESSOR)
        record.update(
            jti=caller.token_id,
            holder=caller.identity.thumbprint,
            tenant=caller.tenant,
            evidence_kind=caller.kind.value,
            policy_sha256=caller.policy_sha256,
        )
        if caller.policy_sha256 != self._policy.sha256:
            raise TokenError("the policy has changed since this token was issued; attest again")
        return caller

    def _package(self, release: Release) -> RegisteredPackage:
        package = self._registry.lookup(
            release.tenant, release.package_id, release.sequence, release.manifest_digest.hex()
        )
        if self._clock() >= package.expires_at:
            raise LeaseExpiredError("the package has expired; pack a new sequence")
        return package

    def _limits(self, package: RegisteredPackage) -> Limits:
        own = self._policy.lease
        return Limits(
            lease_seconds=own.seconds,
            tokens_per_grant=own.tokens_per_grant,
            tokens_per_release=min(own.tokens_per_release, package.token_budget),
            not_after=package.expires_at,
        )


def _record_terms(record: dict[str, object], terms: LeaseTerms) -> None:
    record.update(lease_id=terms.lease_id, lease_expires_at=terms.expires_at, tokens_granted=terms.tokens_granted)


def _check_tokens(count: int) -> None:
    if not 0 <= count <= MAX_TOKENS:
        raise InvalidInputError("a number of tokens must be from 0 to 2^53 - 1")
