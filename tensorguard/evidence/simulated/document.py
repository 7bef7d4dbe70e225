"""The signed document of simulated evidence: canonical JSON followed by a 64-byte Ed25519 signature."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from tensorguard.crypto import canonical
from tensorguard.evidence.claims import Role

SIGNATURE_BYTES = 64
MAX_EVIDENCE_BYTES = 4096
SIGNING_DOMAIN = b"tssp-simulated-evidence/v1\x00"


class SimulatedDocument(BaseModel):
    """What the simulated platform reports."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Literal["simulated"]
    version: Literal[1]
    measurement: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{96}$")]
    role: Annotated[Role, Field(strict=False)]
    report_data: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
    issued_at: Annotated[int, Field(ge=0, le=2**53 - 1)]
    debug: bool = False

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical.dumps(self.model_dump(mode="json"))
