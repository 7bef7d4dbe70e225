from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_documented_reasons_are_those_of_the_sources() -> None:
    """The codes that sources of this kind refuse with, which are in calls as they stand or given to a check."""
    refusing = {"EvidenceRefusedError", "AllowedGuestPolicy"}
    codes = {
        argument.value
        for path in (ROOT / "tensorguard" / "evidence" / "snp").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in refusing
        for argument in node.args[1:]
        if isinstance(argument, ast.Constant)
    }
    text = (ROOT / "docs" / "attestation.md").read_text()
    table = text[text.index("| reason | SEV-SNP |") :].split("\n\n")[0]
    assert codes == set(re.findall(r"`(\w+)`", table))
