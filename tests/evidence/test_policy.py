from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tensorguard.errors import PolicyError
from tensorguard.evidence.policy import load_policy, parse_policy

GOOD: dict[str, Any] = {
    "version": 1,
    "id": "test",
    "evidence_kinds": ["simulated"],
    "tenants": ["tenant"],
    "roles": {"coprocessor": {"measurements": [{"evidence_kind": "simulated", "values": {"code": "ab" * 48}}]}},
    "lease": {"seconds": 60, "tokens_per_grant": 10, "tokens_per_release": 100},
}


def changed(path: str, value: object) -> dict[str, Any]:
    document = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    target: Any = document
    for part in parents:
        target = target[int(part) if part.isdecimal() else part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return document


def test_yaml_and_json_are_the_same_policy() -> None:
    one, two = parse_policy(json.dumps(GOOD)), parse_policy("# comment\n" + yaml.safe_dump(GOOD))
    assert one == two
    assert one.sha256 == two.sha256
    assert len(one.sha256) == 64


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tenants", ["other"]),
        ("lease.seconds", 61),
        ("token_life_seconds", 200),
        ("allow_debug", True),
        ("allow_x25519", True),
    ],
)
def test_every_change_changes_the_hash(path: str, value: object) -> None:
    assert parse_policy(json.dumps(changed(path, value))).sha256 != parse_policy(json.dumps(GOOD)).sha256


@pytest.mark.parametrize(
    ("path", "value"),
    [
        # unknown fields, everywhere
        ("extra", 1),
        ("lease.extra", 1),
        ("roles.coprocessor.extra", 1),
        ("roles.coprocessor.measurements.0.extra", 1),
        # nothing named allows nothing
        ("evidence_kinds", []),
        ("tenants", []),
        ("roles", {}),
        ("roles.coprocessor.measurements", []),
        ("roles.coprocessor.measurements.0.values", {}),
        # a tuple that names no code
        ("roles.coprocessor.measurements.0.values", {"other": "ab" * 48}),
        ("roles.coprocessor.measurements.0.evidence_kind", "tdx"),
        # unknown names
        ("evidence_kinds", ["mock"]),
        ("roles", {"admin": GOOD["roles"]["coprocessor"]}),
        ("version", 2),
        ("version", ...),
        ("id", "Not A Name"),
        ("tenants", ["*"]),
        # limits and types
        ("token_life_seconds", 301),
        ("token_life_seconds", 0),
        ("lease.seconds", 0),
        ("lease.seconds", "60"),
        ("lease.tokens_per_grant", True),
        ("lease", ...),
        ("allow_debug", "no"),
        ("roles.coprocessor.measurements.0.values.code", "AB" * 48),
        ("roles.coprocessor.measurements.0.values.code", "ab" * 4),
    ],
)
def test_refused(path: str, value: object) -> None:
    with pytest.raises(PolicyError):
        parse_policy(json.dumps(changed(path, value)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "version: 1",
        "{",
        "a: &x [1]\nb: *x",
        "version: 1\nversion: 1",
        "!!python/object/apply:os.system ['true']",
        "[" * 5000,
        "x: " + "y" * 300_000,
        b"\xff\xfe",
    ],
)
def test_malformed_text_is_refused(text: str | bytes) -> None:
    with pytest.raises(PolicyError):
        parse_policy(text)


def test_the_message_names_the_field() -> None:
    with pytest.raises(PolicyError, match=r"lease\.extra"):
        parse_policy(json.dumps(changed("lease.extra", 1)))


def test_aliases_and_repeated_keys_are_the_reason() -> None:
    with pytest.raises(PolicyError, match="aliases"):
        parse_policy("a: &x [1]\nb: *x")
    with pytest.raises(PolicyError, match="twice"):
        parse_policy(json.dumps(GOOD)[:-1] + ', "allow_debug": false, "allow_debug": true}')


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="nowhere"):
        load_policy(tmp_path / "nowhere")
