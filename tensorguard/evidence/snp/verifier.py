"""Verifies SEV-SNP attestation reports against AMD's roots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import Claims, EvidenceKind
from tensorguard.evidence.snp.chain import AMD_ROOTS, VerifiedChain, verify_chain
from tensorguard.evidence.snp.claims import SnpClaims
from tensorguard.evidence.snp.endorsement_key import EndorsementKey, is_endorsement_key, parse_endorsement_key
from tensorguard.evidence.snp.endorsements import Endorsements, parse_endorsements
from tensorguard.evidence.snp.product import Product, TcbVersion
from tensorguard.evidence.snp.report import AttestationReport, parse_report


class SnpVerifier:
    """Turns authentic SEV-SNP reports into claims."""

    kind = EvidenceKind.SNP

    def __init__(self, roots: Mapping[str, Product] = AMD_ROOTS) -> None:
        """`roots`: SHA-256 (hex) of the ARK certificates that are trusted, with the product of each. Default: AMD's."""
        self._roots = dict(roots)

    def verify(self, evidence: bytes, endorsements: Sequence[bytes] = (), *, at: float) -> Claims:
        """Claims of a report of 1184 bytes.

        `endorsements` must hold the certificate of the key that signed it (VCEK or VLEK), that one's issuer (ASK or
        ASVK) and the root (ARK). A revocation list of the root is checked if there is one; certificates of other chips
        and products do no harm. Raises EvidenceRefusedError: what `parse_report`, `parse_endorsements`,
        `parse_endorsement_key` and `verify_chain` raise, `collateral_missing`, `product_mismatch`, `chip_id_mismatch`,
        `tcb_mismatch` and `signature`.
        """
        report = parse_report(evidence)
        supplied = parse_endorsements(endorsements)
        key = _signer(report, supplied, at)
        chain = verify_chain(key, supplied, self._roots, at=at)
        _check_binding(report, key)
        if not _is_signed_by(report, key):
            raise EvidenceRefusedError(
                f"the report is not signed by the {key.signing_key.value.upper()} that was supplied with it",
                "signature",
            )
        return Claims(
            kind=self.kind,
            measurements={
                "measurement": report.measurement.hex(),
                "host_data": report.host_data.hex(),
                "id_key_digest": report.id_key_digest.hex(),
                "author_key_digest": report.author_key_digest.hex(),
            },
            report_data=report.report_data,
            issued_at=None,
            debug=report.guest_policy.debug,
            details=_details(report, key, chain),
        )

    def check_endorsement(self, endorsement: bytes) -> None:
        """Raises EvidenceRefusedError: `endorsement_unused` or `malformed`."""
        parse_endorsements((endorsement,))


def _signer(report: AttestationReport, supplied: Endorsements, at: float) -> EndorsementKey:
    """The key to verify with: of the kind that the report names, and of several the one that fits it best.

    First by chip and firmware version, which tells a fleet's chips apart; then by the signature, for the keys of
    several providers; then by time, as AMD makes a new certificate for the same key whenever it is asked.
    """
    keys = [parse_endorsement_key(item) for item in supplied.certificates if is_endorsement_key(item)]
    keys = [key for key in keys if key.signing_key is report.signing_key]
    if not keys:
        raise EvidenceRefusedError(
            f"the certificate of the {report.signing_key.value.upper()} is missing; supply the one that AMD issued for "
            "this chip and firmware version",
            "collateral_missing",
        )

    def fit(key: EndorsementKey) -> tuple[bool, bool]:
        return key.chip_id == report.chip_id, key.tcb == report.reported_tcb

    best = max(map(fit, keys))
    keys = [key for key in keys if fit(key) == best]
    return max(keys, key=lambda key: (_is_signed_by(report, key), key.is_valid(at))) if len(keys) > 1 else keys[0]


def _is_signed_by(report: AttestationReport, key: EndorsementKey) -> bool:
    try:
        key.public_key.verify(report.signature, report.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def _check_binding(report: AttestationReport, key: EndorsementKey) -> None:
    """The report speaks of the chip and firmware version that AMD issued the key for."""
    if report.cpuid is not None and report.product is not key.product:
        raise EvidenceRefusedError(
            f"the report is from another processor than the {key.product.label} of its certificate", "product_mismatch"
        )
    if key.chip_id is not None and key.chip_id != report.chip_id:
        raise EvidenceRefusedError(
            "the certificate is of another chip than the report names; supply its VCEK, or turn MASK_CHIP_ID off",
            "chip_id_mismatch",
        )
    if key.tcb != report.reported_tcb:
        raise EvidenceRefusedError(
            f"the certificate is for TCB {key.tcb.hex()}, the report is from {report.reported_tcb.hex()}; supply the "
            "certificate for the reported version",
            "tcb_mismatch",
        )


def _details(report: AttestationReport, key: EndorsementKey, chain: VerifiedChain) -> SnpClaims:
    def tcb(raw: bytes) -> TcbVersion:
        return TcbVersion.from_bytes(raw, chain.product)

    return SnpClaims(
        report_version=report.version,
        product=chain.product,
        signing_key=key.signing_key,
        csp_id=key.csp_id,
        chip_id=report.chip_id.hex() if any(report.chip_id) else None,
        vmpl=report.vmpl,
        guest_svn=report.guest_svn,
        guest_policy=report.guest_policy,
        platform=report.platform,
        reported_tcb=tcb(report.reported_tcb),
        current_tcb=tcb(report.current_tcb),
        committed_tcb=tcb(report.committed_tcb),
        launch_tcb=tcb(report.launch_tcb),
        current_firmware=report.current_firmware,
        committed_firmware=report.committed_firmware,
        family_id=report.family_id.hex(),
        image_id=report.image_id.hex(),
        report_id=report.report_id.hex(),
        report_id_ma=report.report_id_ma.hex(),
        launch_mitigations=report.launch_mitigations,
        current_mitigations=report.current_mitigations,
        crl_number=chain.crl_number,
        certificate_expires_at=int(key.certificate.not_valid_after_utc.timestamp()),
    )
