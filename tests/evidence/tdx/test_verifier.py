"""What the TDX verifier accepts and refuses, on quotes of an authority that the tests make up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import Claims, EvidenceKind
from tensorguard.evidence.tdx.claims import TcbStatus, TdxClaims
from tensorguard.evidence.tdx.reasons import refusal_of
from tensorguard.evidence.tdx.verifier import TdxVerifier
from tests.support.synthetic_pki.tdx import (
    DAY,
    FMSPC,
    MRTD,
    NOW,
    PPID,
    REPORT_DATA,
    Collateral,
    Pki,
    Quote,
    Times,
    pem,
    with_machine,
)

PKI = Pki()
QUOTE = Quote()
PAST = Times(NOW - 40 * DAY, NOW - DAY)
FUTURE = Times(NOW + DAY, NOW + 40 * DAY)


def verify(
    quote: Quote = QUOTE,
    collateral: Collateral | None = None,
    *,
    at: float = NOW,
    files: list[bytes] | None = None,
    roots: tuple[str, ...] = (PKI.root_fingerprint,),
) -> Claims:
    given = [(collateral or Collateral(pki=quote.pki)).bundle()] if files is None else files
    return TdxVerifier(roots).verify(quote.encode(), given, at=at)


def details(*arguments: Any, **options: Any) -> TdxClaims:
    found = verify(*arguments, **options).details
    assert isinstance(found, TdxClaims)
    return found


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        verify(*arguments, **options)
    return refused.value.detail


@pytest.mark.parametrize("version", [4, 5])
def test_claims_are_what_the_quote_and_the_certificate_say(version: int) -> None:
    claims = verify(Quote(version=version))
    assert (claims.kind, claims.report_data, claims.issued_at) == (EvidenceKind.TDX, REPORT_DATA, None)
    assert (claims.debug, claims.role, claims.nonce) == (False, None, None)
    assert claims.measurements["mrtd"] == MRTD.hex()
    assert [claims.measurements[f"rtmr{i}"][:2] for i in range(4)] == ["20", "21", "22", "23"]
    others = [claims.measurements[name][:2] for name in ("mrseam", "mrconfigid", "mrowner", "mrownerconfig")]
    assert others == ["5e", "0c", "0d", "0e"]
    assert ("mrservicetd" in claims.measurements) == (version == 5)
    assert claims.details == TdxClaims(
        quote_version=version,
        tcb_status=TcbStatus.UP_TO_DATE,
        advisory_ids=(),
        tcb_eval_data_number=17,
        collateral_issued_at=NOW - DAY,
        collateral_expires_at=NOW + 30 * DAY,
        fmspc=FMSPC.hex(),
        ppid=PPID.hex(),
        dynamic_platform=False,
        cached_keys=False,
        smt_enabled=False,
        td_attributes="0000001000000000",
        xfam="e702060000000000",
        tee_tcb_svn="03010300000000000000000000000000",
    )


def test_files_may_come_apart_and_in_any_order() -> None:
    parts = Collateral().parts()
    expected = verify()
    assert verify(files=parts) == expected
    assert verify(files=parts[::-1]) == expected


@pytest.mark.parametrize("missing", range(5))
def test_every_part_is_needed(missing: int) -> None:
    parts = Collateral().parts()
    del parts[missing]
    assert refusal(files=parts) == ("signature" if missing == 2 else "collateral_missing")


def test_documents_may_have_signers_of_their_own() -> None:
    """As while Intel replaces its signing certificate; each of them has to be in time and not revoked."""
    old = replace(PKI, signer_key="old")
    tcb_info, _, _, *lists = Collateral().parts()
    for pki, reason in (
        (old, None),
        (replace(old, signer_times=PAST), "certificate_expired"),
        (replace(old, root_name="evil"), "signature"),
    ):
        qe_identity = Collateral(pki=pki, tcb_key="old").parts()[1]
        files = [tcb_info, qe_identity, pem(PKI.tcb_signer), pem(pki.tcb_signer), *lists]
        if reason is None:
            assert verify(files=files) == verify()
        else:
            assert refusal(files=files) == reason
        for certificate in (PKI.tcb_signer, pki.tcb_signer):
            revoked = [*files[:4], PKI.root_crl(certificate), lists[1]]
            assert refusal(files=revoked) in ("revoked", reason)


def test_no_endorsements_at_all() -> None:
    assert refusal(files=[]) == "collateral_missing"


@pytest.mark.parametrize("status", [status for status in TcbStatus if status is not TcbStatus.REVOKED])
def test_the_platforms_status_is_a_claim(status: TcbStatus) -> None:
    advisories = ("INTEL-SA-00615", "INTEL-SA-00837")
    found = details(collateral=Collateral(status=status.value, advisories=advisories))
    assert (found.tcb_status, found.advisory_ids) == (status, advisories)


def test_the_worse_status_of_platform_module_and_quoting_enclave_counts() -> None:
    assert details(collateral=Collateral(qe_status="OutOfDate")).tcb_status is TcbStatus.OUT_OF_DATE
    assert details(collateral=Collateral(module_status="OutOfDate")).tcb_status is TcbStatus.OUT_OF_DATE


@pytest.mark.parametrize("where", ["status", "qe_status", "module_status"])
def test_revoked_has_no_claims(where: str) -> None:
    assert refusal(collateral=Collateral(**{where: "Revoked"})) == "tcb_revoked"


@pytest.mark.parametrize("flags", [(True, False, False), (False, True, False), (False, False, True), None])
def test_platform_flags(flags: tuple[bool, bool, bool] | None) -> None:
    found = details(Quote(pki=with_machine(PKI, flags=flags)))
    assert (found.dynamic_platform, found.cached_keys, found.smt_enabled) == (flags or (None, None, None))


def test_intels_own_root_is_the_default() -> None:
    with pytest.raises(EvidenceRefusedError) as refused:
        TdxVerifier().verify(Quote().encode(), [Collateral().bundle()], at=NOW)
    assert refused.value.detail == "root_not_trusted"


def test_another_root_is_refused() -> None:
    other = replace(PKI, root_name="evil")
    assert refusal(Quote(pki=other)) == "root_not_trusted"
    # The evil authority's certificates below the real root, which has the same name.
    mixed = Quote(pki=other, chain=pem(other.pck, other.platform_ca, PKI.root))
    assert refusal(mixed, Collateral()) == "chain"
    assert refusal(collateral=Collateral(pki=other)) == "signature"
    # The right key signed, but it is the other root that says whose key it is.
    tcb_info, qe_identity, _, *lists = Collateral().parts()
    assert refusal(files=[tcb_info, qe_identity, pem(other.tcb_signer), *lists]) == "signature"


def test_chain_must_be_the_pck_certificates() -> None:
    assert refusal(Quote(chain=pem(PKI.tcb_signer, PKI.platform_ca, PKI.root))) == "chain"
    assert refusal(Quote(chain=replace(PKI, machine=None).pck_chain)) == "malformed"
    self_made = replace(PKI, root_name="platform")  # signed by a key that is no root
    assert refusal(Quote(chain=pem(PKI.pck, self_made.platform_ca, PKI.root))) == "chain"


@pytest.mark.parametrize("name", ["root_times", "ca_times", "pck_times", "signer_times"])
def test_certificates_outside_their_time(name: str) -> None:
    for times, reason in ((PAST, "certificate_expired"), (FUTURE, "certificate_not_yet_valid")):
        pki = replace(PKI, **{name: times})
        assert refusal(Quote(pki=pki), roots=(pki.root_fingerprint,)) == reason


@pytest.mark.parametrize("name", ["tcb_times", "qe_times", "root_crl", "pck_crl"])
def test_collateral_outside_its_time(name: str) -> None:
    for times, reason in ((PAST, "collateral_expired"), (FUTURE, "collateral_not_yet_valid")):
        change = {name: getattr(PKI, name)(times=times) if name.endswith("crl") else times}
        assert refusal(collateral=Collateral(**change)) == reason


def test_the_time_is_the_callers() -> None:
    verify(at=NOW + 29 * DAY)
    assert refusal(at=NOW + 31 * DAY) == "collateral_expired"
    assert refusal(at=NOW - 2 * DAY) == "collateral_not_yet_valid"
    assert refusal(at=NOW + 600 * DAY) == "certificate_expired"


def test_revoked_certificates() -> None:
    assert refusal(collateral=Collateral(pck_crl=PKI.pck_crl(PKI.pck))) == "revoked"
    for certificate in (PKI.platform_ca, PKI.tcb_signer, PKI.root):
        assert refusal(collateral=Collateral(root_crl=PKI.root_crl(certificate))) == "revoked"


def test_a_list_that_the_authority_did_not_sign_is_no_list() -> None:
    other = replace(PKI, root_name="evil")
    assert refusal(collateral=Collateral(root_crl=other.root_crl())) == "signature"


def test_a_newer_list_replaces_an_older_one_in_any_order() -> None:
    older = PKI.pck_crl(times=Times(NOW - 5 * DAY, NOW + 30 * DAY))
    newer = PKI.pck_crl(PKI.pck)
    for lists in ([older, newer], [newer, older]):
        assert refusal(files=[*Collateral().parts()[:4], *lists]) == "revoked"


def test_the_later_tcb_recovery_counts_in_any_order() -> None:
    later = Collateral(evaluation=18, status="OutOfDate").parts()[:2]
    for files in ([*Collateral().parts(), *later], [*later, *Collateral().parts()]):
        found = details(files=files)
        assert (found.tcb_eval_data_number, found.tcb_status) == (18, TcbStatus.OUT_OF_DATE)


def test_a_document_from_later_does_not_hide_the_present_one() -> None:
    later = Collateral(tcb_times=FUTURE, evaluation=18).parts()[0]
    assert details(files=[*Collateral().parts(), later]).tcb_eval_data_number == 17


def test_collateral_of_other_families_is_left_aside() -> None:
    other = Collateral(fmspc=b"\x01" * 6, status="OutOfDate").parts()[0]
    assert details(files=[other, *Collateral().parts()]).tcb_status is TcbStatus.UP_TO_DATE
    assert refusal(collateral=Collateral(fmspc=b"\x01" * 6)) == "collateral_missing"


@pytest.mark.parametrize(
    ("quote", "reason"),
    [
        (Quote(pck_key="other"), "signature"),
        (Quote(attestation_key="other"), "signature"),
        (Quote(qe_svn=3), "qe_identity"),
        (Quote(qe_signer=b"\x01" * 32), "qe_identity"),
        (Quote(mr_signer_seam=b"\x01" * 48), "tdx_module"),
        (Quote(seam_attributes=b"\x01" * 8), "tdx_module"),
        (Quote(tee_tcb_svn=bytes([2, 1, 3] + [0] * 13)), "tdx_module"),
        (Quote(td_attributes=bytes.fromhex("0100001000000000")), "debug_enabled"),
        (Quote(td_attributes=bytes.fromhex("0000000000000000")), "td_attributes_not_allowed"),
        (Quote(td_attributes=bytes.fromhex("0001001000000000")), "td_attributes_not_allowed"),
        (Quote(td_attributes=bytes.fromhex("0000003000000000")), "migratable"),
        (Quote(version=5, mr_service_td=b"\x01" * 48), "migratable"),
        (Quote(tee_type=0), "not_tdx"),
        (Quote(padding=b"\0" * 70 + b"x"), "malformed"),
    ],
)
def test_each_flaw_of_a_quote_has_its_reason(quote: Quote, reason: str) -> None:
    assert refusal(quote) == reason


def test_padding_is_not_looked_at() -> None:
    assert verify(Quote(padding=b"\0" * 3000)) == verify()


@pytest.mark.parametrize(
    ("collateral", "reason"),
    [
        (Collateral(tcb_key="other"), "signature"),
        (Collateral(minimum_pce_svn=12), "tcb_level_not_found"),
        (Collateral(extra={"pceId": "0001"}), "collateral_mismatch"),
        (Collateral(extra={"id": "SGX"}), "collateral_missing"),
        (Collateral(extra={"version": 2}), "collateral_mismatch"),
        (Collateral(status="Unheard"), "malformed"),
        (Collateral(extra={"issueDate": "yesterday"}), "malformed"),
    ],
)
def test_each_flaw_of_collateral_has_its_reason(collateral: Collateral, reason: str) -> None:
    assert refusal(collateral=collateral) == reason


def test_words_that_this_version_does_not_know_are_a_refusal() -> None:
    assert refusal_of("Verification failed: something new").detail == "verification_failed"
    assert refusal_of("").detail == "verification_failed"
