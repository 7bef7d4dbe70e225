"""The attestor's signing key and the key sets (RFC 7517) that relying parties verify its tokens with."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.crypto import canonical
from tensorguard.errors import InvalidInputError, TokenError
from tensorguard.evidence.identity import jwk_of, load_signing_key, thumbprint

MAX_KEY_SET_BYTES = 64 * 1024
MAX_KEYS = 16


class AttestorKey:
    """ES256 key that signs tokens and audit records."""

    __slots__ = ("private_key", "thumbprint")

    def __init__(self, private_key: ec.EllipticCurvePrivateKey) -> None:
        self.private_key = private_key
        self.thumbprint = thumbprint(private_key.public_key())

    @classmethod
    def generate(cls) -> AttestorKey:
        """A new key, in memory only."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    def sign(self, data: bytes) -> bytes:
        """ECDSA P-256 with SHA-256, DER."""
        return self.private_key.sign(data, ec.ECDSA(hashes.SHA256()))

    def key_set(self) -> KeySet:
        """The public part, as what relying parties load."""
        return KeySet([self.private_key.public_key()])

    def __repr__(self) -> str:
        return f"AttestorKey({self.thumbprint})"


class KeySet:
    """P-256 public keys by thumbprint."""

    def __init__(self, keys: Iterable[ec.EllipticCurvePublicKey]) -> None:
        self._keys = {thumbprint(key): key for key in keys}

    @classmethod
    def from_jwks(cls, data: bytes) -> KeySet:
        """Keys of a JWK set. Raises TokenError unless it holds well-formed P-256 keys and nothing else."""
        try:
            if len(data) > MAX_KEY_SET_BYTES:
                raise ValueError("too large")
            entries = json.loads(data)["keys"]
            if not isinstance(entries, list) or not 0 < len(entries) <= MAX_KEYS:
                raise ValueError("number of keys")
            return cls([_from_jwk(entry) for entry in entries])
        except (ValueError, KeyError, TypeError, RecursionError, InvalidInputError):
            raise TokenError("the attestor's key set is malformed") from None

    def to_jwks(self) -> bytes:
        """JWK set, canonical JSON."""
        return canonical.dumps(
            {"keys": [{**jwk_of(key), "alg": "ES256", "kid": name, "use": "sig"} for name, key in self._keys.items()]}
        )

    def only(self, names: Collection[str]) -> KeySet:
        """The set with just the pinned keys. Raises TokenError when none of them is in this set."""
        keys = [key for name, key in self._keys.items() if name in names]
        if not keys:
            raise TokenError(
                "the attestor does not have the pinned key; check its address and the configured thumbprint"
            )
        return KeySet(keys)

    def get(self, name: str) -> ec.EllipticCurvePublicKey | None:
        """The key with this thumbprint."""
        return self._keys.get(name)

    @property
    def thumbprints(self) -> tuple[str, ...]:
        """Names of the keys."""
        return tuple(self._keys)


def _from_jwk(entry: dict[str, str]) -> ec.EllipticCurvePublicKey:
    if entry["kty"] != "EC" or entry["crv"] != "P-256" or "d" in entry:
        raise ValueError("not a P-256 public key")
    coordinates = [base64.urlsafe_b64decode(entry[name] + "=" * (-len(entry[name]) % 4)) for name in ("x", "y")]
    key = load_signing_key(b"\x04" + b"".join(coordinates))
    if "kid" in entry and entry["kid"] != thumbprint(key):
        raise ValueError("kid is not the key's thumbprint")
    return key
