"""The options that `tensafe evidence verify` and `tensafe policy explain` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tensorguard.evidence.claims import EvidenceKind, Role

Kind = Annotated[EvidenceKind, typer.Option(help="Kind of the evidence.")]
EvidenceFile = Annotated[Path, typer.Option(help="Evidence file, raw or hexadecimal text.")]
PolicyFile = Annotated[Path, typer.Option(help="Policy that it is appraised by (YAML or JSON).")]
Endorsements = Annotated[
    Optional[list[Path]],  # noqa: UP045 - typer evaluates these on Python 3.10
    typer.Option(help="Certificates, revocation lists, collateral: a file or a folder of them; repeat for more."),
]
MoreEndorsements = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Argument(metavar="FILE", help="More endorsements, so that several can follow --endorsements."),
]
At = Annotated[str, typer.Option(help="RFC 3339 time that certificates are checked at; default now.")]
Nonce = Annotated[str, typer.Option(help="Challenge the evidence must answer, hexadecimal.")]
ReportData = Annotated[str, typer.Option(help="Report data the evidence must have, hexadecimal.")]
RoleName = Annotated[
    Optional[Role],  # noqa: UP045
    typer.Option(help="Role whose measurements count; default any of the policy."),
]
SimulatedRoot = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Public key file of the root that signs simulated evidence."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
