from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from pydantic import ValidationError

from tensorguard.errors import PolicyError
from tensorguard.evidence.policy import parse_policy
from tensorguard.evidence.snp.policy import SnpPolicy
from tests.support.policies import SNP_SECTION, snp_policy


def changed(path: str, value: object) -> dict[str, Any]:
    document = copy.deepcopy(SNP_SECTION)
    *parents, last = path.split(".")
    target: Any = document
    for part in parents:
        target = target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return document


def parse(section: dict[str, Any]) -> SnpPolicy:
    return SnpPolicy.model_validate(section)


def test_the_section_is_accepted() -> None:
    parse(SNP_SECTION)
    parse(changed("chip_ids", ["ab" * 64]))
    parse({**SNP_SECTION, "signing_keys": ["vcek", "vlek"], "csp_ids": ["CN=cloud.example"]})


@pytest.mark.parametrize("field", sorted(SNP_SECTION))
def test_nothing_may_be_left_out(field: str) -> None:
    with pytest.raises(ValidationError):
        parse(changed(field, ...))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("extra", 1),
        ("tcb_floors", {}),
        ("tcb_floors", {"rome": SNP_SECTION["tcb_floors"]["milan"]}),
        ("tcb_floors.milan.launch", ...),
        ("tcb_floors.milan.launch.microcode", ...),
        ("tcb_floors.milan.launch.microcode", 256),
        ("tcb_floors.milan.launch.microcode", "219"),
        ("tcb_floors.milan.launch.ucode", 1),
        ("tcb_floors.milan.launch.fmc", 1),  # of Turin only
        ("tcb_floors", {"turin": SNP_SECTION["tcb_floors"]["milan"]}),  # which needs it
        ("signing_keys", []),
        ("signing_keys", ["vlek"]),  # of any provider
        ("signing_keys", ["none"]),
        ("csp_ids", ["CN=cloud.example"]),  # without vlek
        ("vmpls", []),
        ("vmpls", [4]),
        ("minimum_abi", {"major": 1}),
        ("allow_smt", "yes"),
        ("required_guest_policy", ["debug"]),
        ("required_platform", ["smt"]),
        ("chip_ids", []),
        ("chip_ids", "all"),
        ("chip_ids", ["ab" * 8]),
        ("chip_ids", ["AB" * 64]),
        ("revoked_chip_ids", ["ab"]),
        ("require_crl", 1),
    ],
)
def test_refused(path: str, value: object) -> None:
    with pytest.raises(ValidationError):
        parse(changed(path, value))


def test_an_empty_list_of_providers() -> None:
    with pytest.raises(ValidationError):
        parse({**SNP_SECTION, "signing_keys": ["vlek"], "csp_ids": []})


def test_the_section_goes_with_the_kind() -> None:
    document = snp_policy({"measurement": "ab" * 48})
    del document["snp"]
    with pytest.raises(PolicyError, match="section 'snp'"):
        parse_policy(json.dumps(document))
    parsed = parse_policy(json.dumps({**document, "snp": SNP_SECTION}))
    assert parsed.snp == parse(SNP_SECTION)
    other = parse_policy(json.dumps({**document, "snp": changed("require_crl", True)}))
    assert other.sha256 != parsed.sha256
