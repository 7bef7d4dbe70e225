"""Verifies TDX quotes offline: dcap-qvl for Intel's appraisal rules, this module for what it leaves open.

dcap-qvl verifies the signatures, the chains with their revocation lists, the quoting enclave's identity, and finds the
TCB level of platform, TDX module and quoting enclave. Whether that level is good enough is the policy's decision, so
nothing here depends on it, except that a revoked one has no claims.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import dcap_qvl
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import Claims, EvidenceKind
from tensorguard.evidence.tdx.certificates import check_chain, check_revocation, check_times, is_issued, to_pem
from tensorguard.evidence.tdx.claims import TcbStatus, TdxClaims
from tensorguard.evidence.tdx.collateral import Endorsements, SignedDocument, sort_endorsements, windows
from tensorguard.evidence.tdx.quote import Quote, parse_quote
from tensorguard.evidence.tdx.reasons import refusal_of

INTEL_SGX_ROOT_CA = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
"""SHA-256 of the certificate (DER) that Intel publishes as IntelSGXRootCA.der; the root of TDX, too."""

_REGISTERS = {
    "mrtd": "mr_td",
    "rtmr0": "rt_mr0",
    "rtmr1": "rt_mr1",
    "rtmr2": "rt_mr2",
    "rtmr3": "rt_mr3",
    "mrseam": "mr_seam",
    "mrsignerseam": "mr_signer_seam",
    "mrconfigid": "mr_config_id",
    "mrowner": "mr_owner",
    "mrownerconfig": "mr_owner_config",
}
_FLAGS = {"True": True, "False": False}


class TdxVerifier:
    """Turns an authentic TDX quote and the collateral for its platform into claims."""

    kind = EvidenceKind.TDX

    def __init__(self, roots: Sequence[str] = (INTEL_SGX_ROOT_CA,)) -> None:
        """`roots`: SHA-256 fingerprints (hex) of the root certificates that are trusted."""
        self._roots = frozenset(roots)

    def verify(self, evidence: bytes, endorsements: Sequence[bytes] = (), *, at: float) -> Claims:
        """Claims of an authentic quote whose certificates and collateral were all in time at `at`.

        Raises EvidenceRefusedError; the reasons are in docs/attestation.md.
        """
        quote = parse_quote(evidence)
        pck, authority, root = quote.chain
        if root.fingerprint(hashes.SHA256()).hex() not in self._roots:
            raise EvidenceRefusedError(
                "the root of the quote's certificates is not the one that is trusted", "root_not_trusted"
            )
        check_chain(quote.chain)
        given = sort_endorsements(tuple(endorsements))
        fmspc = _platform_family(pck)
        tcb_info, qe_identity = given.tcb_info(fmspc, at), given.qe_identity(at)
        tcb_signer, qe_signer = _signer(given, tcb_info, root), _signer(given, qe_identity, root)
        root_crl, pck_crl = given.revocation_list(root, at), given.revocation_list(authority, at)
        check_times((pck, authority, root, tcb_signer, qe_signer), at)
        for begins, ends in windows((tcb_info, qe_identity, root_crl, pck_crl)):
            _check_window(begins, ends, at)
        check_revocation(root_crl, root, (authority, tcb_signer, qe_signer, root))
        check_revocation(pck_crl, authority, (pck,))
        collateral = dcap_qvl.QuoteCollateralV3(
            pck_crl_issuer_chain=to_pem(authority, root).decode(),
            root_ca_crl=root_crl.public_bytes(serialization.Encoding.DER),
            pck_crl=pck_crl.public_bytes(serialization.Encoding.DER),
            tcb_info_issuer_chain=to_pem(tcb_signer, root).decode(),
            tcb_info=tcb_info.text,
            tcb_info_signature=tcb_info.signature,
            qe_identity_issuer_chain=to_pem(qe_signer, root).decode(),
            qe_identity=qe_identity.text,
            qe_identity_signature=qe_identity.signature,
        )
        verifier = dcap_qvl.QuoteVerifier(root.public_bytes(serialization.Encoding.DER))
        now = int(at)
        policy = dcap_qvl.QuotePolicy.claims_only(now)
        try:
            verified = verifier.verify_with_policy(quote.encoded, collateral, now, policy)
        except ValueError as error:
            raise refusal_of(str(error)) from None
        claims = _claims(quote, json.loads(verified.to_json()), tcb_info, qe_identity)
        if quote.padding.strip(b"\0"):
            raise EvidenceRefusedError("the quote is followed by something that is not padding", "malformed")
        return claims

    def check_endorsement(self, endorsement: bytes) -> None:
        """Raises EvidenceRefusedError: `endorsement_unused` or `malformed`."""
        sort_endorsements((endorsement,))


def _claims(quote: Quote, verified: dict[str, Any], tcb_info: SignedDocument, qe_identity: SignedDocument) -> Claims:
    """Claims from what dcap-qvl found, with the fields of its claims version 1."""
    pck = verified["platform"]["pck"]
    if bytes(pck["pce_id"]).hex() != tcb_info.pce_id:
        raise EvidenceRefusedError(
            "the TCB info is for another provisioning enclave (PCE id) than the platform's", "collateral_mismatch"
        )
    [body] = verified["report"].values()
    report = body.get("base", body)
    registers = {name: report[field] for name, field in _REGISTERS.items()}
    if "mr_service_td" in body:
        registers["mrservicetd"] = body["mr_service_td"]
    return Claims(
        kind=EvidenceKind.TDX,
        measurements=registers,
        report_data=bytes.fromhex(report["report_data"]),
        issued_at=None,
        debug=bytes.fromhex(report["td_attributes"])[0] != 0,
        details=TdxClaims(
            quote_version=quote.version,
            tcb_status=TcbStatus(verified["tcb"]["status"]),
            advisory_ids=tuple(verified["tcb"]["advisory_ids"]),
            tcb_eval_data_number=min(tcb_info.evaluation, qe_identity.evaluation),
            collateral_issued_at=max(verified["latest_issue_date"], verified["qe_iden_latest_issue_date"]),
            collateral_expires_at=min(
                verified["earliest_expiration_date"], verified["qe_iden_earliest_expiration_date"]
            ),
            fmspc=bytes(pck["fmspc"]).hex(),
            ppid=bytes(pck["ppid"]).hex(),
            dynamic_platform=_FLAGS.get(pck["dynamic_platform"]),
            cached_keys=_FLAGS.get(pck["cached_keys"]),
            smt_enabled=_FLAGS.get(pck["smt_enabled"]),
            td_attributes=report["td_attributes"],
            xfam=report["xfam"],
            tee_tcb_svn=report["tee_tcb_svn"],
        ),
    )


def _platform_family(pck: x509.Certificate) -> str:
    try:
        return bytes(dcap_qvl.parse_pck_extension_from_pem(to_pem(pck)).fmspc).hex()
    except ValueError:
        raise EvidenceRefusedError("the PCK certificate does not name its platform family", "malformed") from None


def _signer(given: Endorsements, document: SignedDocument, root: x509.Certificate) -> x509.Certificate:
    """The certificate below the root whose key signed the document."""
    for certificate in given.certificates:
        if _signed(document, certificate) and is_issued(certificate, root):
            return certificate
    raise EvidenceRefusedError(
        f"no certificate of the trusted root among the endorsements signed the collateral's {document.id} document",
        "signature",
    )


def _signed(document: SignedDocument, certificate: x509.Certificate) -> bool:
    key, signature = certificate.public_key(), document.signature
    if not isinstance(key, ec.EllipticCurvePublicKey) or len(signature) != 64:
        return False
    encoded = encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
    try:
        key.verify(encoded, document.text.encode(), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _check_window(begins: float, ends: float, at: float) -> None:
    if at < begins:
        raise EvidenceRefusedError("the collateral is from later than this time", "collateral_not_yet_valid")
    if at > ends:
        raise EvidenceRefusedError("the collateral has expired; get it again", "collateral_expired")
