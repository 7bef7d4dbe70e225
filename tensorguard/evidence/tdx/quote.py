"""The structure of a TDX quote, read strictly: every length is exact, and there is one way to write it.

Intel TDX DCAP Quote Generation Library and Quote Verification Library, appendix A.3 (version 4) and A.4 (version 5).
What dcap-qvl leaves unread and unsigned (the outer certification data's type, line breaks of the certificates, the root
at the end of their chain, what follows the quote) is checked here, so that a quote has no byte that can be changed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cryptography import x509

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.tdx.certificates import load_certificates, to_pem

MAX_QUOTE_BYTES = 32 * 1024
TEE_TYPE_SGX = 0
TEE_TYPE_TDX = 0x81
_HEADER = struct.Struct("<HHI40x")
_BODY_HEADER = struct.Struct("<HI")
_REPORT_BYTES = {2: 584, 3: 648}
"""Body type -> size, version 5: TDREPORT of TDX 1.0 and of 1.5. Version 4 has the first, without saying so."""
_SIGNATURE_AND_KEY_BYTES = 64 + 64
_QE_REPORT_AND_SIGNATURE_BYTES = 384 + 64
_QE_REPORT_CERTIFICATION = 6
_PCK_CERTIFICATE_CHAIN = 5
_CHAIN_LENGTH = 3


@dataclass(frozen=True, slots=True)
class Quote:
    """A well-formed quote. Nothing in it is verified."""

    version: int
    encoded: bytes
    """The quote without what follows it."""
    padding: bytes
    """What follows it: some collectors hand out the whole buffer it was written to."""
    chain: tuple[x509.Certificate, x509.Certificate, x509.Certificate]
    """PCK certificate, its authority, root."""


def parse_quote(evidence: bytes) -> Quote:
    """Raises EvidenceRefusedError: `malformed`, or `not_tdx` for a quote of an SGX enclave."""
    if len(evidence) > MAX_QUOTE_BYTES:
        raise EvidenceRefusedError(f"a quote has at most {MAX_QUOTE_BYTES} bytes", "malformed")
    reader = _Reader(evidence)
    version, _, tee_type = reader.unpack(_HEADER)
    if tee_type == TEE_TYPE_SGX:
        raise EvidenceRefusedError("this is a quote of an SGX enclave, not of a TDX trust domain", "not_tdx")
    if tee_type != TEE_TYPE_TDX or version not in (4, 5):
        raise _malformed("it is not a TDX quote of version 4 or 5")
    body_type, size = reader.unpack(_BODY_HEADER) if version == 5 else (2, _REPORT_BYTES[2])
    if _REPORT_BYTES.get(body_type) != size:
        raise _malformed("its body is not a TDREPORT of TDX 1.0 or 1.5")
    reader.take(size)
    authentication = _Reader(reader.take(reader.uint("<I")))
    end = reader.position
    authentication.take(_SIGNATURE_AND_KEY_BYTES)
    certification = _certification(authentication, _QE_REPORT_CERTIFICATION)
    certification.take(_QE_REPORT_AND_SIGNATURE_BYTES)
    certification.take(certification.uint("<H"))
    chain = _certification(certification, _PCK_CERTIFICATE_CHAIN)
    return Quote(version, evidence[:end], evidence[end:], _parse_chain(chain.rest()))


def _certification(reader: _Reader, kind: int) -> _Reader:
    """The last field of a structure: certification data of this type, which fills it."""
    found, size = reader.unpack(_BODY_HEADER)
    data = _Reader(reader.take(size))
    if found != kind:
        raise _malformed(f"its certification data are of type {found}, not {kind} (certificates in the quote)")
    if reader.rest():
        raise _malformed("there is something behind its certification data")
    return data


def _parse_chain(data: bytes) -> tuple[x509.Certificate, x509.Certificate, x509.Certificate]:
    text = data[:-1] if data.endswith(b"\0") else data
    try:
        certificates = load_certificates(text)
    except ValueError:
        raise _malformed("its certificates cannot be read") from None
    if len(certificates) != _CHAIN_LENGTH:
        raise _malformed("it must hold the PCK certificate, its authority and the root")
    if to_pem(*certificates) != text:
        raise _malformed("its certificates are not plain PEM")
    leaf, authority, root = certificates
    return leaf, authority, root


class _Reader:
    """Takes bytes from the front. Raises EvidenceRefusedError when there are too few."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self.position:
            raise _malformed("it is cut off")
        self.position += count
        return self._data[self.position - count : self.position]

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def uint(self, layout: str) -> int:
        return self.unpack(struct.Struct(layout))[0]

    def rest(self) -> bytes:
        return self._data[self.position :]


def _malformed(why: str) -> EvidenceRefusedError:
    return EvidenceRefusedError(f"the quote is malformed: {why}", "malformed")
