"""What an authentic TDX quote and its collateral say, beyond the claims of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class TcbStatus(str, Enum):
    """Intel's judgement of a platform's firmware and quoting enclave, the worse of the two (PCS API v4, tcbStatus)."""

    UP_TO_DATE = "UpToDate"
    SW_HARDENING_NEEDED = "SWHardeningNeeded"
    CONFIGURATION_NEEDED = "ConfigurationNeeded"
    CONFIGURATION_AND_SW_HARDENING_NEEDED = "ConfigurationAndSWHardeningNeeded"
    OUT_OF_DATE = "OutOfDate"
    OUT_OF_DATE_CONFIGURATION_NEEDED = "OutOfDateConfigurationNeeded"
    REVOKED = "Revoked"


@dataclass(frozen=True, slots=True)
class TdxClaims:
    """Everything a `TdxPolicy` may ask. Hex is lower-case, in the byte order of the quote or the certificate."""

    quote_version: int
    tcb_status: TcbStatus
    advisory_ids: tuple[str, ...]
    """Intel security advisories that concern the platform, the TDX module or the quoting enclave."""
    tcb_eval_data_number: int
    """Of the older of the two documents (TCB info, QE identity)."""
    collateral_issued_at: int
    """Unix seconds: the latest issue date of anything in the collateral."""
    collateral_expires_at: int
    """Unix seconds: the earliest end of anything in the collateral and of the certificates."""
    fmspc: str
    """Platform family, 6 bytes."""
    ppid: str
    """This platform's own id, 16 bytes, from the PCK certificate."""
    dynamic_platform: bool | None
    """Packages may be added to the platform later. None where the PCK certificate does not say."""
    cached_keys: bool | None
    """Intel's registration service keeps the platform's root keys. None where the certificate does not say."""
    smt_enabled: bool | None
    """Simultaneous multithreading is on. None where the certificate does not say."""
    td_attributes: str
    """8 bytes (TDX module specification, ATTRIBUTES)."""
    xfam: str
    """8 bytes: processor features that the trust domain may use."""
    tee_tcb_svn: str
    """16 bytes: version of the TDX module."""
