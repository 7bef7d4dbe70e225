"""Evidence and endorsements, which anyone can hand to an attestor before it knows who they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cbor2

from fuzz.edits import message_from
from fuzz.memory import bounded_memory
from fuzz.target import Target
from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.claims import Claims
from tensorguard.evidence.nitro.verifier import NitroVerifier
from tensorguard.evidence.nvidia.verifier import GpuVerifier
from tensorguard.evidence.snp.claims import SnpClaims
from tensorguard.evidence.snp.product import Product
from tensorguard.evidence.snp.verifier import SnpVerifier
from tensorguard.evidence.tdx.verifier import TdxVerifier
from tests.support.synthetic_pki import certificates, nitro, nvidia, snp, tdx

# Certificates, JSON and CBOR become objects of some hundred bytes.
FACTOR, ALLOWANCE = 64, 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Case:
    """Evidence that is accepted, with the files that it is verified with."""

    verify: Callable[[bytes, Sequence[bytes]], object]
    evidence: bytes
    files: tuple[bytes, ...] = ()


def tdx_target() -> Target:
    """Quotes of both versions; collateral as one file a part, and as one file in all."""
    verifier = TdxVerifier((tdx.Pki().root_fingerprint,))
    quotes = [tdx.Quote(version=version).encode() for version in (4, 5)]
    folders = (tuple(tdx.Collateral().parts()), (tdx.Collateral().bundle(),))

    def verify(evidence: bytes, files: Sequence[bytes]) -> Claims:
        return verifier.verify(evidence, files, at=tdx.NOW)

    return _target("tdx", [Case(verify, quote, files) for files in folders for quote in quotes])


def snp_target() -> Target:
    """Reports of both layouts and both kinds of key, with a revocation list or with a host's table of certificates."""
    milan, turin = snp.chip(), snp.chip(Product.TURIN, "vlek")
    verifier = SnpVerifier({**milan.roots, **turin.roots})
    table = snp.certificate_table(list(zip(_TABLE_GUIDS, milan.endorsements, strict=True)))

    def verify(evidence: bytes, files: Sequence[bytes]) -> Claims:
        """A changed revocation list may be another maker's, so that there is none: whether one is needed, the policy
        says by its number."""
        claims = verifier.verify(evidence, files, at=snp.AT)
        assert isinstance(claims.details, SnpClaims)
        return dataclasses.replace(claims, details=dataclasses.replace(claims.details, crl_number=None))

    return _target(
        "snp",
        [
            Case(verify, milan.report(), (*milan.endorsements, milan.ark.revoke())),
            Case(verify, turin.report(), tuple(turin.endorsements)),
            Case(verify, milan.report(version=2), (table,)),
        ],
    )


def nitro_target() -> Target:
    """A document, tagged and not."""
    module = nitro.Module.create()
    verifier = NitroVerifier([module.root])

    def verify(evidence: bytes, files: Sequence[bytes]) -> Claims:
        return verifier.verify(evidence, files, at=certificates.NOW)

    payload = cbor2.dumps(module.document())
    tagged = nitro.sign1(payload, module.chain[-1].key, tagged=True)
    return _target("nitro", [Case(verify, module.evidence()), Case(verify, tagged)])


def nvidia_target() -> Target:
    """The reports of one GPU and of two, and the bytes of a report and of a chain themselves."""
    root = certificates.issue("NVIDIA Device Identity CA", days=(-1, 1))
    first, second = nvidia.Gpu.create(root), nvidia.Gpu.create(root)
    verifier = GpuVerifier([first.root])

    def verify(evidence: bytes, _: Sequence[bytes]) -> object:
        return verifier.verify(evidence, at=certificates.NOW)

    def verify_report(report: bytes, _: Sequence[bytes]) -> object:
        return verifier.verify(nvidia.evidence(first.device(report)), at=certificates.NOW)

    cases = [
        Case(verify, nvidia.evidence(first.device())),
        Case(verify, nvidia.evidence(first.device(), second.device())),
        Case(verify_report, first.report()),
    ]
    return _target("nvidia", cases)


def _target(name: str, cases: Sequence[Case]) -> Target:
    """The first byte says which case is sent, and which of its parts the edits behind it change: the evidence, or one
    of the files."""
    expected = [case.verify(case.evidence, case.files) for case in cases]

    def run(data: bytes) -> None:
        if not data:
            return
        number = data[0] % len(cases)
        case = cases[number]
        place = data[0] // len(cases) % (1 + len(case.files))
        parts = [case.evidence, *case.files]
        parts[place] = message_from(data[1:], [parts[place]])
        with bounded_memory(sum(map(len, parts)), FACTOR, ALLOWANCE):
            try:
                claims = case.verify(parts[0], parts[1:])
            except EvidenceRefusedError:
                return
            # What is accepted says what was signed: padding and layout alone may differ.
            assert claims == expected[number]

    seeds = [
        bytes([number + len(cases) * place, 0])
        for number, case in enumerate(cases)
        for place in range(1 + len(case.files))
    ]
    return Target(name, seeds, run)


_TABLE_GUIDS = (
    "63da758d-e664-4564-adc5-f4b93be8accd",
    "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "c0b406a4-a803-4952-9743-3fb6014cd0ae",
)
"""VCEK, ASK, ARK (GHCB 56421, 4.1.8.1)."""

EVIDENCE_TARGETS = {"tdx": tdx_target, "snp": snp_target, "nitro": nitro_target, "nvidia": nvidia_target}
