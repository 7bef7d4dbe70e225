"""The coprocessor as a process: what it needs, what it says, how it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.he_lora.__main__ import main
from services.he_lora.server import build_coprocessor
from services.he_lora.settings import HeLoraSettings, load_settings
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import (
    ConfigurationError,
    EvidenceRefusedError,
    NotFoundError,
    PackageError,
    PrivacyBoundError,
    TenSafeError,
    TokenError,
    UnavailableError,
)
from tensorguard.evidence.development import initialise_development_state
from tensorguard.evidence.policy import load_policy
from tensorguard.package.manifest import ReleasePolicy
from tensorguard.package.writer import pack_adapter
from tensorguard.store.state import AttestorState
from tests.support.coprocessor import TENANT, World, running_attestor
from tests.support.packages import register_another_key

HEAVY = {"torch", "vllm", "transformers"}
MODULES = [
    "adapters",
    "evaluation",
    "leases",
    "loading",
    "metering",
    "revocations",
    "server",
    "servicer",
    "sessions",
    "settings",
    "__main__",
]


def environment(settings: HeLoraSettings, **changes: str) -> dict[str, str]:
    def text(value: Any) -> str:
        return json.dumps([str(item) for item in value]) if isinstance(value, list) else str(value)

    names = ("packages", "publisher_keys", "tenant", "attestor", "attestor_thumbprint", "simulated_root_key", "listen")
    given = {f"TENSAFE_HE_LORA_{name.upper()}": text(getattr(settings, name)) for name in names}
    return os.environ | given | {f"TENSAFE_HE_LORA_{name.upper()}": value for name, value in changes.items()}


def start(settings: HeLoraSettings, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "services.he_lora"],
        env=environment(settings, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_module_loads_the_inference_stack() -> None:
    imports = ", ".join(f"services.he_lora.{name}" for name in MODULES)
    code = f"import sys, {imports}; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    present = {path.stem for path in Path("services/he_lora").glob("*.py")} - {"__init__"}
    assert present == set(MODULES), "a new module: list it here"


def test_process_serves_and_stops(world: World) -> None:
    process = start(world.settings)
    assert process.stdout is not None
    try:
        lines = []
        while not lines or lines[-1].get("event") != "ready":
            lines.append(json.loads(process.stdout.readline()))
        assert lines[-1]["address"].startswith("127.0.0.1:")
        events = {line["event"] for line in lines}
        assert "he.load_weights" in events and any(event.startswith("SIMULATED EVIDENCE") for event in events)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
    finally:
        process.kill()


def test_busy_port_is_one_line(world: World) -> None:
    process = start(world.settings, listen=world.endpoint)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = errors.strip().splitlines()
    assert "is in use" in line and "TENSAFE_HE_LORA_LISTEN" in line


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TENSAFE_HE_LORA_LISTEN", "nowhere", "--listen (or TENSAFE_HE_LORA_LISTEN)"),
        ("TENSAFE_HE_LORA_PACKAGES", "[]", "--packages"),
        ("TENSAFE_HE_LORA_TENNANT", "x", "unknown environment variable TENSAFE_HE_LORA_TENNANT"),
        ("TENSAFE_HE_LORA_MAX_SESSIONS", "0", "--max-sessions"),
    ],
)
def test_wrong_settings_are_named(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    for key, given in environment(world.settings).items():
        monkeypatch.setenv(key, given)
    load_settings([])
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings([])
    assert message in caught.value.message


def refusal(world: World, **changes: Any) -> TenSafeError:
    with pytest.raises(TenSafeError) as caught:
        build_coprocessor(world.settings.model_copy(update=changes))
    return caught.value


def test_each_obstacle_has_its_own_error(world: World, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.pem"
    stranger.write_bytes(SigningKeys.generate().public.to_pem())
    foreign = initialise_development_state(tmp_path / "foreign", TENANT)
    assert type(refusal(world, attestor="127.0.0.1:1")) is UnavailableError
    assert "plaintext_network" in refusal(world, attestor="attestor.example:7401").message
    assert type(refusal(world, attestor_thumbprint="A" * 43)) is TokenError
    assert type(refusal(world, publisher_keys=[stranger])) is PackageError
    assert type(refusal(world, packages=[tmp_path / "absent.tssp"])) is PackageError
    assert type(refusal(world, tenant="other")) is ConfigurationError
    assert type(refusal(world, simulated_root_key=None)) is ConfigurationError
    assert type(refusal(world, simulated_root_key=foreign.simulated_root_key)) is EvidenceRefusedError
    assert type(refusal(world, privacy_bound_log2=-100)) is PrivacyBoundError
    assert "given twice" in refusal(world, packages=world.settings.packages * 2).message


def command(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    """`python -m services.he_lora` with changed settings; its one line on standard error."""
    for name, value in environment(world.settings.model_copy(update=changes)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["services.he_lora"])
    capsys.readouterr()
    assert main() == 1
    output, errors = capsys.readouterr()
    assert '"ready"' not in output
    (line,) = errors.splitlines()
    return line


def test_the_command_says_what_to_change(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = tmp_path / "stranger.pem"
    stranger.write_bytes(SigningKeys.generate().public.to_pem())
    foreign = initialise_development_state(tmp_path / "foreign", TENANT)
    tampered = tmp_path / "tampered.tssp"
    data = bytearray(world.settings.packages[0].read_bytes())
    data[-100] ^= 1
    tampered.write_bytes(data)
    other_key = tmp_path / "other-key.tssp"
    pack_adapter(
        world.folder / "adapter",
        other_key,
        base_model_dir=world.folder / "model",
        tenant=TENANT,
        package_id="other-key",
        sequence=1,
        signing_keys=world.publisher,
        key_registrar=register_another_key(AttestorState.open(world.state.state_dir).packages),
    )
    cases: list[tuple[dict[str, Any], str, str, str]] = [
        ({"packages": [tampered]}, "package_tampered", str(tampered), "get the file again"),
        ({"packages": [other_key]}, "package_key", "other-key", "pack the adapter again"),
        ({"packages": [tmp_path / "absent.tssp"]}, "package", "absent.tssp", "No such file"),
        ({"publisher_keys": [stranger]}, "package", "not trusted here", "give the public key file"),
        ({"attestor": "127.0.0.1:1"}, "unavailable", "attestor 127.0.0.1:1", "is it running"),
        ({"attestor_thumbprint": "A" * 43}, "token", "pinned key", "check its address and the configured thumbprint"),
        ({"simulated_root_key": foreign.simulated_root_key}, "evidence_refused", "root", "set simulated_root_key"),
        ({"tenant": "other"}, "configuration", "belongs to tenant", "set --tenant"),
    ]
    for changes, reason, *texts in cases:
        line = command(world, monkeypatch, capsys, **changes)
        assert line.startswith("error: ") and line.endswith(f"[{reason}]"), line
        for text in texts:
            assert text in line


@pytest.mark.parametrize(
    ("options", "variables", "code", "named"),
    [
        (["--pakages", "x"], {}, 2, "--pakages"),
        (["--tenan", "x"], {}, 2, "--tenan"),  # no abbreviations
        ([], {"TENSAFE_HE_LORA_TENNANT": "x"}, 1, "TENSAFE_HE_LORA_TENNANT"),
        ([], {"TENSAFE_HELORA_TENANT": "x"}, 1, "TENSAFE_HELORA_TENANT"),
    ],
)
def test_the_command_refuses_unknown_settings_by_name(
    world: World, options: list[str], variables: dict[str, str], code: int, named: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "services.he_lora", *options],
        env=environment(world.settings) | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code
    assert named in result.stderr.splitlines()[-1]


def test_tampered_package(world: World, tmp_path: Path) -> None:
    data = bytearray(world.settings.packages[0].read_bytes())
    data[-100] ^= 1
    tampered = tmp_path / "tampered.tssp"
    tampered.write_bytes(data)
    assert refusal(world, packages=[tampered]).reason == "package_tampered"


def test_package_the_attestor_does_not_know(world: World, tmp_path: Path) -> None:
    pack_adapter(
        world.folder / "adapter",
        tmp_path / "unregistered.tssp",
        base_model_dir=world.folder / "model",
        tenant=TENANT,
        package_id="unregistered",
        sequence=1,
        signing_keys=world.publisher,
        key_registrar=lambda **_: None,
    )
    assert type(refusal(world, packages=[tmp_path / "unregistered.tssp"])) is NotFoundError


@pytest.mark.parametrize("same", [True, False])
def test_package_that_names_a_policy(world: World, tmp_path: Path, same: bool) -> None:
    policy = load_policy(world.state.policy_file)
    pack_adapter(
        world.folder / "adapter",
        tmp_path / "named.tssp",
        base_model_dir=world.folder / "model",
        tenant=TENANT,
        package_id=f"named-{same}".lower(),
        sequence=1,
        signing_keys=world.publisher,
        key_registrar=AttestorState.open(world.state.state_dir).packages.register,
        release_policy=ReleasePolicy(id=policy.id, sha256=policy.sha256 if same else "ab" * 32),
    )
    if same:
        coprocessor = build_coprocessor(world.settings.model_copy(update={"packages": [tmp_path / "named.tssp"]}))
        coprocessor.server.stop(0)
        coprocessor.client.close()
    else:
        error = refusal(world, packages=[tmp_path / "named.tssp"])
        assert type(error) is PackageError and policy.id in error.message and "--policy" in error.message


def test_policy_that_does_not_know_this_code(world: World, tmp_path: Path) -> None:
    state = initialise_development_state(tmp_path / "state", TENANT, measurement="ab" * 48)
    with running_attestor(state) as address:
        error = refusal(
            world,
            attestor=address,
            attestor_thumbprint=state.attestor_thumbprint,
            simulated_root_key=state.simulated_root_key,
        )
    assert type(error) is EvidenceRefusedError
