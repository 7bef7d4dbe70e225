"""Intel's collateral, from files in any order to the one set that a quote is verified with.

A file is a certificate or a chain of them (PEM, DER), a revocation list (PEM, DER), an answer of Intel's provisioning
service (PCS API v4: TCB info or QE identity, JSON), or all of these in one JSON object, as collateral caches and tools
hand it out (QuoteCollateralV3). Parts of several files are put together, and nothing is trusted before it is verified.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from cryptography import x509

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.tdx.certificates import load_certificates, load_revocation_list

MAX_FILE_BYTES = 256 * 1024
MAX_FILES = 256
_ANSWER = re.compile(r'\s*\{\s*"(tcbInfo|enclaveIdentity)"\s*:\s*')
_BUNDLE = frozenset(
    {
        "pck_crl_issuer_chain",
        "root_ca_crl",
        "pck_crl",
        "tcb_info_issuer_chain",
        "tcb_info",
        "tcb_info_signature",
        "qe_identity_issuer_chain",
        "qe_identity",
        "qe_identity_signature",
    }
)


@dataclass(frozen=True, slots=True)
class SignedDocument:
    """A TCB info or a QE identity: JSON text, and Intel's signature over exactly these bytes."""

    text: str
    signature: bytes
    """r || s, 64 bytes."""
    id: str
    """`TDX` (TCB info) or `TD_QE` (QE identity); others are of SGX."""
    fmspc: str
    """Of a TCB info, lower-case hex; empty for a QE identity."""
    pce_id: str
    evaluation: int
    issued_at: float
    next_update: float


@dataclass(frozen=True, slots=True)
class Endorsements:
    """The parts of all files, sorted by what they are."""

    certificates: list[x509.Certificate] = field(default_factory=list)
    revocation_lists: list[x509.CertificateRevocationList] = field(default_factory=list)
    tcb_infos: list[SignedDocument] = field(default_factory=list)
    qe_identities: list[SignedDocument] = field(default_factory=list)

    def tcb_info(self, fmspc: str, at: float) -> SignedDocument:
        """The TCB info of this platform family to use at this time. Raises EvidenceRefusedError."""
        fitting = [item for item in self.tcb_infos if item.id == "TDX" and item.fmspc == fmspc]
        return _newest(fitting, at, f"the TDX TCB info of platform family (FMSPC) {fmspc}")

    def qe_identity(self, at: float) -> SignedDocument:
        """The identity of the TDX quoting enclave to use at this time. Raises EvidenceRefusedError."""
        fitting = [item for item in self.qe_identities if item.id == "TD_QE"]
        return _newest(fitting, at, "the identity of the TDX quoting enclave")

    def revocation_list(self, issuer: x509.Certificate, at: float) -> x509.CertificateRevocationList:
        """The issuer's newest revocation list of those that had begun. Raises EvidenceRefusedError."""
        fitting = [item for item in self.revocation_lists if item.issuer == issuer.subject]
        if not fitting:
            raise _missing(f"the revocation list of {issuer.subject.rfc4514_string()}")
        return max(fitting, key=lambda item: _preference(item.last_update_utc.timestamp(), at))


@functools.lru_cache(maxsize=16)
def sort_endorsements(files: tuple[bytes, ...]) -> Endorsements:
    """The parts of `files`. The same files are read once.

    Raises EvidenceRefusedError: `endorsement_unused` for a file that is nothing a TDX quote can be verified with,
    `malformed` for one that is cut off or too large.
    """
    if len(files) > MAX_FILES:
        raise EvidenceRefusedError(f"there are more than {MAX_FILES} endorsements", "malformed")
    found = Endorsements()
    for data in files:
        if len(data) > MAX_FILE_BYTES:
            raise EvidenceRefusedError(f"an endorsement has more than {MAX_FILE_BYTES} bytes", "malformed")
        try:
            _add(found, data)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise EvidenceRefusedError("an endorsement is malformed: get the collateral again", "malformed") from None
    return found


def _add(found: Endorsements, data: bytes) -> None:
    start = data.lstrip()[:1]
    if start == b"{":
        _add_json(found, data.decode())
    elif b"-----BEGIN CERTIFICATE-----" in data:
        found.certificates.extend(load_certificates(data))
    elif b"-----BEGIN X509 CRL-----" in data:
        found.revocation_lists.append(load_revocation_list(data))
    elif start == b"0":  # the tag of a DER sequence
        try:
            found.revocation_lists.append(load_revocation_list(data))
        except ValueError:
            found.certificates.extend(load_certificates(data))
    else:
        raise EvidenceRefusedError(
            "an endorsement is neither certificate, revocation list, TCB info, QE identity nor collateral",
            "endorsement_unused",
        )


def _add_json(found: Endorsements, text: str) -> None:
    document = json.loads(text)
    if answer := _ANSWER.match(text):
        _, end = json.JSONDecoder().raw_decode(text, answer.end())
        signed = _document(text[answer.end() : end], document["signature"])
        (found.tcb_infos if answer[1] == "tcbInfo" else found.qe_identities).append(signed)
    elif document.keys() >= _BUNDLE:
        for name in ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain"):
            found.certificates.extend(load_certificates(document[name].encode()))
        for name in ("root_ca_crl", "pck_crl"):
            found.revocation_lists.append(load_revocation_list(bytes.fromhex(document[name])))
        found.tcb_infos.append(_document(document["tcb_info"], document["tcb_info_signature"]))
        found.qe_identities.append(_document(document["qe_identity"], document["qe_identity_signature"]))
    else:
        raise EvidenceRefusedError(
            "a JSON endorsement is neither TCB info, QE identity nor collateral", "endorsement_unused"
        )


def _document(text: str, signature: str) -> SignedDocument:
    content: dict[str, Any] = json.loads(text)
    return SignedDocument(
        text=text,
        signature=bytes.fromhex(signature),
        id=str(content["id"]),
        fmspc=str(content.get("fmspc", "")).lower(),
        pce_id=str(content.get("pceId", "")).lower(),
        evaluation=int(content["tcbEvaluationDataNumber"]),
        issued_at=_seconds(content["issueDate"]),
        next_update=_seconds(content["nextUpdate"]),
    )


def _seconds(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()


def _newest(documents: Sequence[SignedDocument], at: float, what: str) -> SignedDocument:
    if not documents:
        raise _missing(what)
    # Intel publishes two TCB recoveries side by side for a while: the later one is the stricter one.
    return max(documents, key=lambda item: (item.issued_at <= at, item.evaluation, item.issued_at))


def _preference(begins: float, at: float) -> tuple[bool, float]:
    return begins <= at, begins


def _missing(what: str) -> EvidenceRefusedError:
    return EvidenceRefusedError(
        f"{what} is missing: give Intel's collateral for this platform as endorsements", "collateral_missing"
    )


def windows(parts: Sequence[SignedDocument | x509.CertificateRevocationList]) -> Iterator[tuple[float, float]]:
    """When each part begins and ends, Unix seconds. A revocation list without an end ends at once."""
    for part in parts:
        if isinstance(part, SignedDocument):
            yield part.issued_at, part.next_update
        else:
            begins, ends = part.last_update_utc, part.next_update_utc
            yield begins.timestamp(), (ends or begins).timestamp()
