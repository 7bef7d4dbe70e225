"""The section `tdx` of a policy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from tensorguard.evidence.strict import Strict
from tensorguard.evidence.tdx.claims import TcbStatus


def _not_revoked(status: TcbStatus) -> TcbStatus:
    if status is TcbStatus.REVOKED:
        raise ValueError("a revoked platform cannot be allowed")
    return status


Status = Annotated[TcbStatus, Field(strict=False), AfterValidator(_not_revoked)]
Advisory = Annotated[str, StringConstraints(pattern=r"^INTEL-SA-[0-9]{5}$")]
Fmspc = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]
Ppid = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
EightBytes = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]

SEPT_VE_DISABLE = "0000001000000000"
"""TD attributes of an ordinary trust domain: the host cannot inject faults on pages it took away, and no other bit."""


class TdxPolicy(Strict):
    """What a TDX platform must be. A trust domain in debug mode is never accepted, whatever `allow_debug` says.

    A field without a default is one that a default would weaken.
    """

    tcb_statuses: Annotated[list[Status], Field(min_length=1)]
    """Statuses that are accepted. `UpToDate` alone is the strict choice."""
    denied_advisories: Annotated[list[Advisory], Field(max_length=256)]
    """Advisories that must not concern the platform, also where the status is an accepted one."""
    min_tcb_eval_data_number: Annotated[int, Field(ge=1)]
    """Oldest TCB recovery that collateral may be from. Intel counts up, so old collateral cannot hide a newer flaw."""
    allow_dynamic_platform: bool
    allow_cached_keys: bool
    allow_smt: bool
    """Multi-package servers of clouds have all three; a certificate that does not say counts as having them."""
    machines: Literal["any"] | Annotated[list[Ppid], Field(min_length=1, max_length=4096)]
    """PPIDs of the machines that are accepted."""
    fmspcs: Annotated[list[Fmspc], Field(min_length=1, max_length=256)] | None = None
    """Platform families that are accepted; default any that Intel publishes collateral for."""
    td_attributes: list[EightBytes] = Field([SEPT_VE_DISABLE], min_length=1, max_length=16)
    """Whole values that are accepted, in the byte order of the quote."""
    xfams: Annotated[list[EightBytes], Field(min_length=1, max_length=16)] | None = None
    """Whole values that are accepted, in the byte order of the quote; default any."""
