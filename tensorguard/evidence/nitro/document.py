"""The attestation document of a Nitro security module (NSM).

Source: aws-nitro-enclaves-nsm-api, docs/attestation_process.md, sections 2.2 and 3.2.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography import x509

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.certificates import MAX_CHAIN, load_certificate
from tensorguard.evidence.nitro import cbor
from tensorguard.evidence.nitro.cose import MAX_PAYLOAD_BYTES

MAX_PCRS = 32
PCR_BYTES = 48
MAX_CERTIFICATE_BYTES = 1024
MAX_MODULE_ID_CHARACTERS = 128
MAX_PUBLIC_KEY_BYTES = 1024
MAX_USER_DATA_BYTES = 512
MAX_NONCE_BYTES = 512
_REQUIRED = frozenset({"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"})
_OPTIONAL = frozenset({"public_key", "user_data", "nonce"})
_CODE_REGISTERS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class AttestationDocument:
    """A well-formed document. Whether it is authentic is for the signature and the chain to say."""

    module_id: str
    timestamp: int
    """Milliseconds since 1970, by the hypervisor's clock."""
    pcrs: Mapping[int, bytes]
    """Platform configuration registers, SHA-384."""
    chain: tuple[x509.Certificate, ...]
    """The certificate that signed the document first, the root last."""
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None

    @classmethod
    def parse(cls, payload: bytes) -> AttestationDocument:
        """Raises EvidenceRefusedError (`malformed`) for anything that the specification does not allow."""
        fields = cbor.loads(payload, MAX_PAYLOAD_BYTES)
        if not isinstance(fields, dict):
            raise EvidenceRefusedError("the Nitro document is not a map")
        names = fields.keys()
        if not (names >= _REQUIRED and names <= _REQUIRED | _OPTIONAL):
            raise EvidenceRefusedError("the Nitro document lacks a field or has one that is not known")
        module_id = fields["module_id"]
        if not isinstance(module_id, str) or not 0 < len(module_id) <= MAX_MODULE_ID_CHARACTERS:
            raise EvidenceRefusedError("module_id is not a short text")
        if fields["digest"] != "SHA384":
            raise EvidenceRefusedError("the registers are not SHA-384 digests")
        timestamp = fields["timestamp"]
        if type(timestamp) is not int or not 0 < timestamp < 2**53:
            raise EvidenceRefusedError("the timestamp is not a number of milliseconds")
        return cls(
            module_id=module_id,
            timestamp=timestamp,
            pcrs=_pcrs(fields["pcrs"]),
            chain=_chain(fields["certificate"], fields["cabundle"]),
            public_key=_optional(fields, "public_key", 1, MAX_PUBLIC_KEY_BYTES),
            user_data=_optional(fields, "user_data", 0, MAX_USER_DATA_BYTES),
            nonce=_optional(fields, "nonce", 0, MAX_NONCE_BYTES),
        )

    @property
    def debug(self) -> bool:
        """The registers of an enclave in debug mode are zero; a document with any that is comes from no other."""
        return any(not any(self.pcrs[index]) for index in _CODE_REGISTERS)


def _pcrs(value: Any) -> dict[int, bytes]:
    if not isinstance(value, dict) or not 0 < len(value) <= MAX_PCRS:
        raise EvidenceRefusedError(f"pcrs is not a map of 1 to {MAX_PCRS} registers")
    for index, digest in value.items():
        if type(index) is not int or not 0 <= index < MAX_PCRS:
            raise EvidenceRefusedError("a register's index is not a number below 32")
        if not isinstance(digest, bytes) or len(digest) != PCR_BYTES:
            raise EvidenceRefusedError(f"a register does not have {PCR_BYTES} bytes")
    if any(index not in value for index in _CODE_REGISTERS):
        raise EvidenceRefusedError("PCR0, PCR1 and PCR2, which measure the code, must be there")
    return dict(value)


def _chain(certificate: Any, cabundle: Any) -> tuple[x509.Certificate, ...]:
    if not isinstance(cabundle, list) or not 0 < len(cabundle) < MAX_CHAIN:
        raise EvidenceRefusedError(f"cabundle is not a list of 1 to {MAX_CHAIN - 1} certificates")
    # The bundle begins with the root.
    ders = [certificate, *reversed(cabundle)]
    if not all(isinstance(der, bytes) for der in ders):
        raise EvidenceRefusedError("a certificate is not a byte string")
    return tuple(load_certificate(der, MAX_CERTIFICATE_BYTES) for der in ders)


def _optional(fields: Mapping[str, Any], name: str, shortest: int, longest: int) -> bytes | None:
    value = fields.get(name)  # the security module writes null for what it was not given
    if value is None:
        return None
    if not isinstance(value, bytes) or not shortest <= len(value) <= longest:
        raise EvidenceRefusedError(f"{name} is not a byte string of {shortest} to {longest} bytes")
    return value
