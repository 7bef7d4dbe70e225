"""Sorts what was supplied about a chip: certificates and revocation lists, as PEM, DER or a GHCB certificate table."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
import struct
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.utils import CryptographyDeprecationWarning

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.certificates import UNREADABLE

MAX_FILE_BYTES = 256 * 1024
MAX_OBJECTS = 1024
MAX_TABLE_ENTRIES = 64
_PEM_START = b"-----BEGIN "
_PEM = re.compile(rb"-----BEGIN (CERTIFICATE|X509 CRL)-----([A-Za-z0-9+/=\s]+)-----END \1-----")
_DER_SEQUENCE = b"\x30"
_TABLE_ENTRY = struct.Struct("<16sII")
# GHCB specification (56421), 4.1.8.1: what a hypervisor hands its guest beside a report. VCEK, VLEK, ASK, ARK, CRL.
_TABLE_CONTENT = {
    uuid.UUID(name).bytes
    for name in (
        "63da758d-e664-4564-adc5-f4b93be8accd",
        "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
        "4ab7b379-bbac-4fe4-a02f-05aef327c782",
        "c0b406a4-a803-4952-9743-3fb6014cd0ae",
        "92f81bc3-5811-4d3d-97ff-d19f88dc67ea",
    )
}

# AMD numbers every VCEK and VLEK 0, against RFC 5280, and cryptography warns at each of them: nothing that a reader of
# the warning could change. It is silenced for the process, as warnings.catch_warnings is not safe with threads.
warnings.filterwarnings(
    "ignore", message="Parsed a serial number which wasn't positive", category=CryptographyDeprecationWarning
)


@dataclass(frozen=True, slots=True)
class Endorsements:
    """What was supplied: well-formed, not verified. Some of it may concern other chips."""

    certificates: tuple[x509.Certificate, ...]
    revocation_lists: tuple[x509.CertificateRevocationList, ...]


def parse_endorsements(files: Sequence[bytes]) -> Endorsements:
    """The certificates and revocation lists in the files, in any order, each of them once.

    Raises EvidenceRefusedError: `endorsement_unused` for a file that is neither PEM, DER nor a certificate table, and
    `malformed` for one that is damaged or larger than 256 KiB, or for more than 1024 objects in all.
    """
    objects: dict[bytes, x509.Certificate | x509.CertificateRevocationList] = {}
    for content in files:
        if len(content) > MAX_FILE_BYTES:
            raise _malformed(f"a file has more than {MAX_FILE_BYTES} bytes")
        for der in _objects(content):
            if der not in objects:
                objects[der] = _load(der)
            if len(objects) > MAX_OBJECTS:
                raise _malformed(f"there are more than {MAX_OBJECTS} certificates and lists")
    return Endorsements(
        tuple(item for item in objects.values() if isinstance(item, x509.Certificate)),
        tuple(item for item in objects.values() if isinstance(item, x509.CertificateRevocationList)),
    )


def _load(der: bytes) -> x509.Certificate | x509.CertificateRevocationList:
    """Reads every field that is asked for later: cryptography reads most of them only then."""
    with contextlib.suppress(*UNREADABLE):
        certificate = x509.load_der_x509_certificate(der)
        _ = certificate.subject, certificate.issuer, certificate.extensions, certificate.public_key()
        return certificate
    with contextlib.suppress(*UNREADABLE):
        crl = x509.load_der_x509_crl(der)
        _ = crl.issuer, crl.last_update_utc, crl.next_update_utc, crl.extensions, len(crl)
        return crl
    raise _malformed("it holds something that is neither an X.509 certificate nor a revocation list")


def _objects(content: bytes) -> Iterator[bytes]:
    """The DER objects in a file, whichever format it has."""
    if content.lstrip().startswith(_PEM_START):
        yield from _pem_objects(content)
    elif content.startswith(_DER_SEQUENCE):
        yield content
    else:
        for entry in _table_entries(content):
            yield from _pem_objects(entry) if entry.startswith(_PEM_START) else (entry,)


def _pem_objects(content: bytes) -> Iterator[bytes]:
    blocks = _PEM.findall(content)
    if len(blocks) != content.count(_PEM_START):
        raise _malformed("PEM holds something else than whole blocks of CERTIFICATE and X509 CRL")
    for _, body in blocks:
        try:
            yield base64.b64decode(b"".join(body.split()), validate=True)
        except binascii.Error:
            raise _malformed("PEM is not base64") from None


def _table_entries(table: bytes) -> Iterator[bytes]:
    """What a table points to: its entries are GUID, offset and length, up to one of zeros."""
    for start in range(0, len(table) - _TABLE_ENTRY.size + 1, _TABLE_ENTRY.size):
        guid, offset, length = _TABLE_ENTRY.unpack_from(table, start)
        if not any(guid):
            return
        if start == MAX_TABLE_ENTRIES * _TABLE_ENTRY.size:
            raise _malformed(f"the certificate table has more than {MAX_TABLE_ENTRIES} entries")
        if guid not in _TABLE_CONTENT:
            continue  # hypervisors may hand over more than certificates
        if offset + length > len(table):
            raise _malformed("the certificate table points outside of itself")
        yield table[offset : offset + length]
    raise EvidenceRefusedError(
        "an endorsement is neither PEM, DER nor a certificate table, so it is of no use for SEV-SNP",
        "endorsement_unused",
    )


def _malformed(problem: str) -> EvidenceRefusedError:
    return EvidenceRefusedError(
        f"an endorsement is malformed: {problem}; supply certificates and revocation lists as PEM or DER, or the "
        "certificate table of the platform",
        "malformed",
    )
