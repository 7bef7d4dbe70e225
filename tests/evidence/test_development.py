from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tensorguard.errors import ConfigurationError, PolicyError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.development import DevelopmentState, initialise_development_state
from tensorguard.evidence.measurement import code_measurement
from tensorguard.evidence.policy import load_policy
from tensorguard.store.state import AttestorState

NEW_CODE = "cd" * 48


def again(state: DevelopmentState, tenant: str = "tenant") -> DevelopmentState:
    return initialise_development_state(state.state_dir, tenant, measurement=NEW_CODE)


def test_policy_names_simulated_and_both_roles(state: DevelopmentState) -> None:
    policy = load_policy(state.policy_file)
    assert policy.evidence_kinds == [EvidenceKind.SIMULATED]
    assert policy.roles.keys() == {Role.INFERENCE, Role.COPROCESSOR}
    assert "DEVELOPMENT ONLY" in state.policy_file.read_text()


def test_default_measurement_is_the_running_code(tmp_path: Path) -> None:
    state = initialise_development_state(tmp_path / "state", ["one", "two"])
    policy = load_policy(state.policy_file)
    assert policy.roles[Role.COPROCESSOR].measurements[0].values == {"code": code_measurement()}
    assert policy.tenants == ["one", "two"]


def test_everything_is_private(state: DevelopmentState) -> None:
    assert stat.S_IMODE(state.state_dir.stat().st_mode) == 0o700
    for path in state.state_dir.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_keys_stay_and_generated_policy_follows_the_code(state: DevelopmentState) -> None:
    before = {path.name: path.read_bytes() for path in state.state_dir.iterdir()}
    assert again(state) == state
    after = {path.name: path.read_bytes() for path in state.state_dir.iterdir()}
    assert {name for name in after if before[name] != after[name]} == {"policy.yaml"}
    assert NEW_CODE in after["policy.yaml"].decode()
    with AttestorState.open(state.state_dir) as opened:
        assert opened.key.thumbprint == state.attestor_thumbprint


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("seconds: 300", "seconds: 30"),
        lambda text: text.partition("\n")[2],
        lambda text: "version: 1\n",
        lambda text: text + "\n",
    ],
)
def test_a_policy_that_somebody_wrote_is_never_replaced(state: DevelopmentState, edit: object) -> None:
    edited = edit(state.policy_file.read_text())  # type: ignore[operator]
    state.policy_file.write_text(edited)
    again(state, "another-tenant")
    assert state.policy_file.read_text() == edited


def test_open_directory_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        initialise_development_state(tmp_path, "tenant", measurement=NEW_CODE)


def test_impossible_tenant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError):
        initialise_development_state(tmp_path / "state", "Not A Name", measurement=NEW_CODE)
