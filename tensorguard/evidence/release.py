"""What is signed to ask for a key or a renewal, and what a key is sealed to. See docs/attestation.md.

Client and attestor both build these bytes; nothing else in a request or an answer is trusted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tensorguard.crypto.hpke import HpkeSuite
from tensorguard.evidence import transcript

REQUEST_NONCE_BYTES = 32


@dataclass(frozen=True, slots=True)
class Release:
    """The one package release that a request is about."""

    tenant: str
    package_id: str
    sequence: int
    manifest_digest: bytes
    """SHA-256 of the canonical manifest, 32 bytes."""


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """How long and how much a released key is good for."""

    lease_id: str
    expires_at: int
    """Unix seconds."""
    tokens_granted: int
    """In total under this lease."""


@dataclass(frozen=True, slots=True)
class RevocationNotice:
    """What a workload is told of a revocation: a release of its tenant, or workloads of its tenant."""

    number: int
    """Counts up; a watcher asks for those behind the last one it has seen."""
    package_id: str = ""
    sequence: int = 0
    """0: every version of the package."""
    workloads: tuple[str, ...] = ()
    """RFC 7638 thumbprints of their attested keys."""


def release_transcript(
    attestor_thumbprint: str, token: str, release: Release, tokens_wanted: int, request_nonce: bytes
) -> bytes:
    """What the attested key signs to ask for a content key."""
    return transcript.encode(
        transcript.RELEASE,
        attestor_thumbprint,
        hashlib.sha256(token.encode()).digest(),
        release.tenant,
        release.package_id,
        release.sequence,
        release.manifest_digest,
        tokens_wanted,
        request_nonce,
    )


def renew_transcript(
    attestor_thumbprint: str,
    token: str,
    lease_id: str,
    tokens_used: int,
    tokens_wanted: int,
    request_nonce: bytes,
) -> bytes:
    """What the attested key signs to renew a lease."""
    return transcript.encode(
        transcript.RENEW,
        attestor_thumbprint,
        hashlib.sha256(token.encode()).digest(),
        lease_id,
        tokens_used,
        tokens_wanted,
        request_nonce,
    )


def watch_transcript(attestor_thumbprint: str, token: str, after: int, request_nonce: bytes) -> bytes:
    """What the attested key signs to be told of revocations."""
    return transcript.encode(
        transcript.WATCH, attestor_thumbprint, hashlib.sha256(token.encode()).digest(), after, request_nonce
    )


def sealed_key_info(
    attestor_thumbprint: str, suite: HpkeSuite, release: Release, request_nonce: bytes, terms: LeaseTerms
) -> bytes:
    """HPKE `info` of a content key that is sealed with `suite`.

    The terms are in it: whoever does not know the content key cannot make one with other terms that opens.
    """
    return transcript.encode(
        transcript.SEALED_KEY,
        attestor_thumbprint,
        suite.value,
        release.tenant,
        release.package_id,
        release.sequence,
        release.manifest_digest,
        request_nonce,
        terms.lease_id,
        terms.expires_at,
        terms.tokens_granted,
    )
