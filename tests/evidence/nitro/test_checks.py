"""What a policy and an exchange ask of Nitro claims."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tensorguard.errors import EvidenceRefusedError, PolicyError
from tensorguard.evidence.appraisal import appraisal_of
from tensorguard.evidence.claims import Claims, Role
from tensorguard.evidence.identity import WorkloadIdentity
from tensorguard.evidence.nitro.checks import nitro_checks
from tensorguard.evidence.nitro.claims import NitroClaims
from tensorguard.evidence.nitro.verifier import NitroVerifier
from tensorguard.evidence.policy import Policy, parse_policy
from tensorguard.evidence.report_data import Binding, binding
from tests.support.synthetic_pki.certificates import NOW
from tests.support.synthetic_pki.nitro import PCRS, REGISTERS, Module

SECTION: dict[str, Any] = {"required_claims": ["nonce", "public_key", "user_data"], "instances": "any"}
IDENTITY = WorkloadIdentity.generate()
MODULE = Module.create()


def nitro_policy(registers: dict[str, str] = REGISTERS, **section: Any) -> Policy:
    document = {
        "version": 1,
        "id": "nitro",
        "evidence_kinds": ["nitro"],
        "tenants": ["tenant"],
        "roles": {"coprocessor": {"measurements": [{"evidence_kind": "nitro", "values": registers}]}},
        "lease": {"seconds": 60, "tokens_per_grant": 10, "tokens_per_release": 100},
        "nitro": {**SECTION, **section},
    }
    return parse_policy(json.dumps(document))


def bound(**changes: Any) -> Binding:
    fields: dict[str, Any] = {
        "nonce": b"n" * 32,
        "identity": IDENTITY.public,
        "attestor_thumbprint": "thumbprint",
        "tenant": "tenant",
        "role": Role.COPROCESSOR,
        **changes,
    }
    return binding(**fields)


def appraise(policy: Policy | None = None, *, now: float = NOW, **fields: Any) -> None:
    """A document as a workload makes it, with `fields` changed, appraised as an attestor does."""
    own = bound()
    values = {"user_data": own.report_data, "nonce": own.nonce, "public_key": own.public_key, **fields}
    claims = NitroVerifier([MODULE.root]).verify(MODULE.evidence(**values), at=NOW)
    rules = policy or nitro_policy()
    appraisal_of(rules, tenant="tenant", role=Role.COPROCESSOR, binding=own, now=now).verify(claims)


def reason(policy: Policy | None = None, *, now: float = NOW, **fields: Any) -> str:
    with pytest.raises(EvidenceRefusedError) as refused:
        appraise(policy, now=now, **fields)
    return refused.value.detail


def test_accepted() -> None:
    appraise()
    appraise(nitro_policy(instances=["i-0123456789abcdef0"]))


@pytest.mark.parametrize("name", ["nonce", "public_key", "user_data"])
def test_a_key_needs_all_three_whatever_the_policy_requires(name: str) -> None:
    weak = nitro_policy(required_claims=["nonce"] if name != "nonce" else ["user_data"])
    assert reason(weak, **{name: None}) == f"{name}_missing"
    assert reason(weak, **{name: ...}) == f"{name}_missing"
    if name != "public_key":  # the format allows no empty key
        assert reason(weak, **{name: b""}) == f"{name}_missing"


def test_each_field_is_of_this_exchange() -> None:
    other = bound(nonce=b"m" * 32, identity=WorkloadIdentity.generate().public)
    assert reason(nonce=other.nonce) == "nonce_mismatch"
    assert reason(nonce=b"n" * 31) == "nonce_mismatch"
    assert reason(public_key=other.public_key) == "public_key_mismatch"
    assert reason(public_key=IDENTITY.public.signing_key) == "public_key_mismatch"
    assert reason(user_data=other.report_data) == "report_data_mismatch"
    assert reason(user_data=b"n" * 32) == "report_data_mismatch"
    for change in ({"tenant": "other"}, {"role": Role.INFERENCE}, {"attestor_thumbprint": "other"}):
        assert reason(user_data=bound(**change).report_data) == "report_data_mismatch"


def test_the_document_is_new() -> None:
    assert reason(now=NOW + 301) == reason(now=NOW - 301) == "evidence_time"
    appraise(now=NOW + 299)


def test_debug_and_code() -> None:
    assert reason(pcrs={**PCRS, **dict.fromkeys(range(3), bytes(48))}) == "debug_enabled"
    assert reason(pcrs={**PCRS, 2: b"x" * 48}) == "measurement_not_allowed"
    assert reason(nitro_policy({**REGISTERS, "pcr4": "ff" * 48})) == "measurement_not_allowed"
    assert reason(nitro_policy({**REGISTERS, "pcr16": "00" * 48})) == "measurement_not_allowed"


@pytest.mark.parametrize("module_id", ["i-0123456789abcdef1-enc0", "i-0123456789abcdef01-enc0", "x"])
def test_another_instance(module_id: str) -> None:
    assert reason(nitro_policy(instances=["i-0123456789abcdef0"]), module_id=module_id) == "instance_not_allowed"


def test_claims_of_another_kind_are_refused() -> None:
    claims = NitroVerifier([MODULE.root]).verify(MODULE.evidence(), at=NOW)
    assert isinstance(claims.details, NitroClaims)
    bare: Claims = dataclasses.replace(claims, details=None)
    section = nitro_policy(instances=["i-0123456789abcdef0"]).nitro
    assert section is not None
    for check in nitro_checks(section):
        with pytest.raises(EvidenceRefusedError) as refused:
            check.verify(bare)
        assert refused.value.detail == "malformed"


@pytest.mark.parametrize(
    "section",
    [
        {"extra": 1},
        {"required_claims": []},
        {"required_claims": ["module_id"]},
        {"required_claims": ["nonce"] * 4},
        {"instances": []},
        {"instances": None},
        {"instances": "all"},
        {"instances": ["i-XYZ"]},
        {"instances": ["*"]},
    ],
    ids=str,
)
def test_a_section_says_what_it_means(section: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="nitro"):
        nitro_policy(**section)


@pytest.mark.parametrize("name", ["required_claims", "instances"])
def test_nothing_has_a_default(name: str) -> None:
    document = json.loads(nitro_policy().model_dump_json(exclude_none=True))
    parse_policy(json.dumps(document))
    del document["nitro"][name]
    with pytest.raises(PolicyError, match=name):
        parse_policy(json.dumps(document))


@pytest.mark.parametrize("missing", ["pcr0", "pcr1", "pcr2"])
def test_a_tuple_names_all_code_registers(missing: str) -> None:
    with pytest.raises(PolicyError, match=missing):
        nitro_policy({name: value for name, value in REGISTERS.items() if name != missing})
