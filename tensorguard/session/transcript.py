"""What both sides of a session sign and derive. Every byte string starts with a domain tag of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tensorguard.errors import InvalidInputError
from tensorguard.evidence import transcript

NONCE_BYTES = 32
SESSION_ID_BYTES = 16

_SESSION = "tensafe-session/v1"
_COPROCESSOR = "tensafe-session/v1/coprocessor"
_HOST_KEY = "tensafe-session/v1/host-key"
_PK1 = "tensafe-session/v1/pk1"
_BASIS = "tensafe-session/v1/basis"
_BASIS_SIGNED = "tensafe-session/v1/basis-signed"
_SHARED_MEMORY = "tensafe-session/v1/shared-memory"
_SHARED_MEMORY_PROOF = "tensafe-session/v1/shared-memory-proof"


@dataclass(frozen=True, slots=True)
class SessionTranscript:
    """Everything both sides agreed on when the session began. Different sessions have different digests."""

    tenant: str
    parameter_set: str
    session_id: bytes
    host_nonce: bytes
    coprocessor_nonce: bytes
    host_token: str
    coprocessor_token: str

    def __post_init__(self) -> None:
        if len(self.session_id) != SESSION_ID_BYTES:
            raise InvalidInputError(f"a session id has {SESSION_ID_BYTES} bytes")
        if len(self.host_nonce) != NONCE_BYTES or len(self.coprocessor_nonce) != NONCE_BYTES:
            raise InvalidInputError(f"session nonces have {NONCE_BYTES} bytes")
        if self.host_nonce == self.coprocessor_nonce:
            raise InvalidInputError("the peer answered with our own nonce")

    @property
    def digest(self) -> bytes:
        """SHA-256 over all fields."""
        return hashlib.sha256(
            transcript.encode(
                _SESSION,
                self.tenant,
                self.parameter_set,
                self.session_id,
                self.host_nonce,
                self.coprocessor_nonce,
                self.host_token,
                self.coprocessor_token,
            )
        ).digest()

    def coprocessor_statement(self) -> bytes:
        """What the coprocessor's attested key signs: "I take part in this session"."""
        return transcript.encode(_COPROCESSOR, self.digest)

    def host_key_statement(self, key_number: int, public_key: bytes) -> bytes:
        """What the host's attested key signs: "pk0 of this key number, in this session, is mine"."""
        return transcript.encode(_HOST_KEY, self.digest, key_number, hashlib.sha256(public_key).digest())

    def pk1_seed(self, key_number: int) -> bytes:
        """32 bytes that pk1 expands from. Neither side alone chooses it: both nonces enter.

        The session id is bound where the seed is expanded.
        """
        return hashlib.sha3_256(
            transcript.encode(_PK1, self.host_nonce, self.coprocessor_nonce, self.parameter_set, key_number)
        ).digest()

    def basis_info(self, adapter: str, manifest_digest: str) -> bytes:
        """HPKE `info` of a sealed basis: opens for this host, in this session, for this release only."""
        return transcript.encode(_BASIS, self.digest, adapter, manifest_digest)

    def basis_statement(self, adapter: str, manifest_digest: str, basis: bytes) -> bytes:
        """What the coprocessor's attested key signs about a basis: anyone can seal to the host's public key."""
        return transcript.encode(_BASIS_SIGNED, self.digest, adapter, manifest_digest, hashlib.sha256(basis).digest())

    def shared_memory_offer(self, name: str, size: int) -> bytes:
        """What the host's attested key signs: "this region of shared memory, in this session, is mine"."""
        return transcript.encode(_SHARED_MEMORY, self.digest, name, size)

    def shared_memory_proof(self, name: str, size: int, challenge: bytes) -> bytes:
        """What the coprocessor's attested key signs: "I have read this challenge in that region"."""
        return transcript.encode(_SHARED_MEMORY_PROOF, self.digest, name, size, challenge)


def join_basis(signature: bytes, basis: bytes) -> bytes:
    """Plaintext of a sealed basis: length of the signature (2 bytes, big endian), signature, basis."""
    return len(signature).to_bytes(2, "big") + signature + basis


def split_basis(plaintext: bytes) -> tuple[bytes, bytes]:
    """(signature, basis). Raises InvalidInputError."""
    length = int.from_bytes(plaintext[:2], "big")
    if len(plaintext) < 2 + length:
        raise InvalidInputError("the sealed basis is malformed")
    return plaintext[2 : 2 + length], plaintext[2 + length :]
