"""What commands that appraise evidence share: reading their files and options, and showing claims."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from tensorguard.errors import ConfigurationError, EvidenceRefusedError
from tensorguard.evidence.claims import Claims, EvidenceKind, Role
from tensorguard.evidence.endorsements import MAX_FILES, read_endorsement
from tensorguard.evidence.offline import OfflineRequest, OfflineResult, appraise_offline
from tensorguard.evidence.policy import load_policy
from tensorguard.evidence.verifiers import verifier_of

MAX_EVIDENCE_BYTES = 64 * 1024
_HEX = re.compile(rb"(?:0x)?(?:[0-9a-fA-F]{2})+")


@dataclasses.dataclass(frozen=True, slots=True)
class EvidenceFiles:
    """The options of a command that appraises."""

    kind: EvidenceKind
    evidence: Path
    endorsements: Sequence[Path]
    policy: Path
    at: str
    nonce: str
    report_data: str
    role: Role | None
    simulated_root: Path | None

    def request(self) -> OfflineRequest:
        """Read the files. Raises ConfigurationError and PolicyError."""
        return OfflineRequest(
            kind=self.kind,
            evidence=read_evidence(self.evidence),
            policy=load_policy(self.policy),
            at=parse_time(self.at),
            endorsements=read_endorsements(self.endorsements),
            role=self.role,
            nonce=parse_hex("--nonce", self.nonce, 512) if self.nonce else None,
            report_data=parse_hex("--report-data", self.report_data, 512) if self.report_data else None,
        )

    def appraise(self) -> tuple[OfflineRequest, OfflineResult]:
        """Read the files and appraise. Raises ConfigurationError and PolicyError."""
        request = self.request()
        return request, appraise_offline(request, verifier_of(self.kind, simulated_root=self.simulated_root))


def read_evidence(path: Path) -> bytes:
    """Evidence of at most 64 KiB from a file, as it is or as hexadecimal text. Raises ConfigurationError."""
    try:
        with path.open("rb") as stream:
            data = stream.read(2 * MAX_EVIDENCE_BYTES + 64)
    except OSError as error:
        raise ConfigurationError(f"cannot read evidence {path}: {error.strerror}") from None
    text = data.strip()
    if _HEX.fullmatch(text):
        data = bytes.fromhex(text.decode().removeprefix("0x"))
    if not 0 < len(data) <= MAX_EVIDENCE_BYTES:
        raise ConfigurationError(f"evidence has 1 to {MAX_EVIDENCE_BYTES} bytes; {path} has not")
    return data


def read_endorsements(paths: Sequence[Path]) -> tuple[bytes, ...]:
    """Each file, and the files of each directory by name. Raises ConfigurationError."""
    files: list[Path] = []
    for path in paths:
        files += sorted(item for item in path.iterdir() if item.is_file()) if path.is_dir() else [path]
    if len(files) > MAX_FILES:
        raise ConfigurationError(f"there are more than {MAX_FILES} endorsements")
    return tuple(read_endorsement(path) for path in files)


def parse_time(text: str) -> float:
    """Unix seconds of an RFC 3339 time; empty: now. Raises ConfigurationError."""
    if not text:
        return time.time()
    try:
        moment = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None or moment.timestamp() < 0:
        raise ConfigurationError("--at is an RFC 3339 time with its zone, for example 2026-03-20T09:41:15Z")
    return moment.timestamp()


def parse_hex(option: str, text: str, limit: int) -> bytes:
    """1 to `limit` bytes. Raises ConfigurationError."""
    if not _HEX.fullmatch(text.encode()) or len(text.removeprefix("0x")) > 2 * limit:
        raise ConfigurationError(f"{option} is hexadecimal, 1 to {limit} bytes")
    return bytes.fromhex(text.removeprefix("0x"))


def report(request: OfflineRequest, result: OfflineResult) -> dict[str, Any]:
    """The decision as a JSON object, with the reason of the decisive refusal."""
    decisive = result.refusals[0] if result.refusals else None
    return {
        "accepted": result.accepted,
        "reason": decisive.detail if decisive else "",
        "message": decisive.message if decisive else "",
        "kind": request.kind.value,
        "at": datetime.fromtimestamp(int(request.at), timezone.utc).isoformat().replace("+00:00", "Z"),
        "policy": {"id": request.policy.id, "sha256": request.policy.sha256},
        "exchange_checked": request.nonce is not None or request.report_data is not None,
        "claims": plain(result.claims) if result.claims is not None else None,
    }


def plain(claims: Claims) -> dict[str, Any]:
    """Claims as JSON values, bytes in lower-case hex."""
    found: dict[str, Any] = _plain(dataclasses.asdict(claims))
    return found


def refusal(error: EvidenceRefusedError) -> dict[str, str]:
    """One refusal as a JSON object."""
    return {"reason": error.detail, "message": error.message}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, frozenset)):
        return [_plain(item) for item in value]
    return value
