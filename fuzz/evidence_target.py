"""Evidence and endorsements, which anyone can hand to an attestor before it knows who they are."""

from __future__ import annotations

from collections.abc import Sequence

from fuzz.edits import message_from
from fuzz.memory import bounded_memory
from fuzz.target import Target
from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.platform import EvidenceVerifier
from tensorguard.evidence.tdx.verifier import TdxVerifier
from tests.support.synthetic_pki import tdx

# Certificates and JSON become objects of some hundred bytes.
FACTOR, ALLOWANCE = 64, 2 * 1024 * 1024


def evidence_target() -> Target:
    """The first byte says which quote is sent and which part of it or of its collateral the edits change."""
    verifier: EvidenceVerifier = TdxVerifier((tdx.Pki().root_fingerprint,))
    parts = [*tdx.Collateral().parts(), tdx.Collateral().bundle()]
    quotes = [tdx.Quote(version=version).encode() for version in (4, 5)]
    expected = [verifier.verify(quote, parts[:5], at=tdx.NOW) for quote in quotes]

    def run(data: bytes) -> None:
        if not data:
            return
        number, place = data[0] & 1, (data[0] >> 1) % (len(parts) + 1)
        quote, files = quotes[number], parts[:5]
        changed = message_from(data[1:], [quote if place == len(parts) else parts[place]])
        if place == len(parts):
            quote = changed
        elif place == 5:  # all parts in one file
            files = [changed]
        else:
            files = [*parts[:place], changed, *parts[place + 1 : 5]]
        with bounded_memory(len(quote) + _size(files), FACTOR, ALLOWANCE):
            try:
                claims = verifier.verify(quote, files, at=tdx.NOW)
            except EvidenceRefusedError:
                return
            # What is accepted says what was signed: padding and layout alone may differ.
            assert claims == expected[number]

    return Target("evidence", [bytes([place << 1, 0]) for place in range(len(parts) + 1)], run)


def _size(files: Sequence[bytes]) -> int:
    return sum(len(data) for data in files)
