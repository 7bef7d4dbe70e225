"""`tensafe measure`: the measurements that a policy must name for what is to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
import yaml

from tensorguard.cli import evidence_options as options
from tensorguard.cli.appraisal import parse_time, read_endorsements, read_evidence
from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.policy import MeasurementTuple
from tensorguard.evidence.reference_values import MAX_DESCRIPTION_BYTES, of_evidence, of_nitro_image, of_this_code
from tensorguard.evidence.verifiers import verifier_of

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)

_FROM_A_MACHINE = (
    "start the image on a machine that you trust, run `tensafe attest --output DIR` in it, and give --evidence "
    "DIR/evidence --endorsements with the maker's files; what it reports is verified and becomes the measurement"
)
_NOT_FROM_IMAGES = {
    EvidenceKind.SNP: (
        "an SEV-SNP launch measurement depends on firmware, kernel, command line, number and model of virtual "
        "processors and the hypervisor, and TenSafe does not compute it: use the tool for your hypervisor (virtee's "
        f"sev-snp-measure for QEMU and EC2, igvmmeasure for IGVM images), or {_FROM_A_MACHINE}"
    ),
    EvidenceKind.TDX: (
        "MRTD and RTMR0 to RTMR2 depend on the virtual firmware, the ACPI tables that the hypervisor makes and what "
        "the boot chain logs, and TenSafe does not compute them: use the tools of who makes the image, or "
        f"{_FROM_A_MACHINE}"
    ),
    EvidenceKind.NITRO: (
        "give --image with the JSON that `nitro-cli build-enclave` printed, or prints as `nitro-cli describe-eif "
        "--eif-path IMAGE`"
    ),
}


@app.command()
def measure(
    kind: Annotated[EvidenceKind, typer.Argument(help="Kind of the evidence that the policy is about.")],
    image: Annotated[
        Optional[Path],  # noqa: UP045 - typer evaluates this on Python 3.10
        typer.Option(help="nitro: JSON that nitro-cli printed about the enclave image file."),
    ] = None,
    evidence: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Evidence of a machine that runs the image, raw or hexadecimal text."),
    ] = None,
    endorsements: options.Endorsements = None,
    more_endorsements: options.MoreEndorsements = None,
    at: options.At = "",
    register: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="With --evidence: a further register to name, such as host_data; repeat for more."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Derive the measurements a policy needs: an entry for `roles.ROLE.measurements`.

    simulated: of the installed code. nitro: of an enclave image, from nitro-cli's JSON. tdx, snp and nitro: of verified
    evidence of a reference machine. What cannot be derived is refused (exit code 2).
    """
    given = [*(endorsements or ()), *(more_endorsements or ())]
    found = _derive(kind, image, evidence, given, at, register or [])
    document = found.model_dump(mode="json", exclude={"note"})
    typer.echo(json.dumps(document) if as_json else yaml.safe_dump([document], sort_keys=False).rstrip())


def _derive(
    kind: EvidenceKind, image: Path | None, evidence: Path | None, endorsements: list[Path], at: str, more: list[str]
) -> MeasurementTuple:
    if evidence is not None:
        if image is not None or kind is EvidenceKind.SIMULATED:
            raise ConfigurationError("--evidence goes with tdx, snp or nitro, and without --image")
        found = verifier_of(kind).verify(read_evidence(evidence), read_endorsements(endorsements), at=parse_time(at))
        return of_evidence(found, more)
    if endorsements or at or more:
        raise ConfigurationError("--endorsements, --at and --register go with --evidence")
    if kind is EvidenceKind.SIMULATED:
        if image is not None:
            raise ConfigurationError("--image is for nitro; simulated evidence measures the installed code")
        return of_this_code()
    if kind is EvidenceKind.NITRO and image is not None:
        return of_nitro_image(_read(image))
    raise ConfigurationError(_NOT_FROM_IMAGES[kind])


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_DESCRIPTION_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}") from None
