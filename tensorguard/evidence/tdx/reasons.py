"""dcap-qvl says why it refuses in words only. This is where its words become our reasons."""

from __future__ import annotations

from tensorguard.errors import EvidenceRefusedError

_REASONS = (
    # What the library says (a part of it), our reason, what the caller can do.
    ("Debug mode is enabled", "debug_enabled", "the trust domain is in debug mode; start it without"),
    ("TD migration is enabled", "migratable", "the trust domain can be migrated; start it without"),
    ("Invalid MR service TD", "migratable", "a service TD is bound to the trust domain; start it without"),
    ("SEPT_VE_DISABLE", "td_attributes_not_allowed", "the TD attribute SEPT_VE_DISABLE is off; start it with it"),
    ("Reserved bits in TD attributes", "td_attributes_not_allowed", "reserved TD attributes are set"),
    ("TCB status is invalid: Revoked", "tcb_revoked", "Intel has revoked the platform's TCB level; update it"),
    ("No matching TCB level", "tcb_level_not_found", "the platform is below every level that Intel lists; update it"),
    ("TDX module", "tdx_module", "the TDX module is not one that Intel lists for this platform; update it"),
    ("Fmspc mismatch", "collateral_mismatch", "the TCB info is for another platform family"),
    ("non-TDX TCB info", "collateral_mismatch", "the TCB info is not for TDX"),
    ("QE report hash mismatch", "signature", "the attestation key is not the quoting enclave's"),
    ("Signature is invalid", "signature", "a signature in the quote or the collateral does not verify"),
    ("signature is invalid", "signature", "the quote's signature does not verify"),
    ("QE vendor", "qe_identity", "the quote is not from Intel's quoting enclave"),
    ("QE ", "qe_identity", "the quoting enclave is not the one that Intel lists; update the machine's DCAP packages"),
    ("CertRevoked", "revoked", "the root is on its own revocation list"),
    ("Failed to verify certificate chain", "chain", "a certificate chain does not verify"),
    ("Failed to decode", "malformed", "the quote or the collateral is malformed"),
    ("Unsupported", "malformed", "the quote is of a form that is not supported"),
)


def refusal_of(message: str) -> EvidenceRefusedError:
    """The refusal for what dcap-qvl said. Words that this version does not know are still a refusal."""
    for part, reason, advice in _REASONS:
        if part in message:
            return EvidenceRefusedError(advice, reason)
    return EvidenceRefusedError("the quote does not verify", "verification_failed")
