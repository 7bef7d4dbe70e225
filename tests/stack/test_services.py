"""What the launcher tells the services is what their settings understand."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.attestor import settings as attestor
from services.gateway import settings as gateway
from services.he_lora import settings as he_lora
from services.inference import settings as inference
from tensorguard.cli.demo_setup import ENGINE_OPTIONS
from tensorguard.errors import ConfigurationError
from tensorguard.evidence.development import DevelopmentState
from tensorguard.stack.process import ServiceSpec
from tensorguard.stack.services import (
    EngineChoice,
    PackagedAdapter,
    TlsFiles,
    attestor_spec,
    coprocessor_spec,
    gateway_spec,
    inference_spec,
)
from tensorguard.stack.settings import StackSettings, load_stack_settings
from tensorguard.stack.stack import choose_ports

STATE = DevelopmentState(Path("/s"), Path("/s/policy.yaml"), Path("/s/root"), Path("/s/root.pub"), "thumbprint")
ADAPTER = PackagedAdapter("law", Path("/p/law.tssp"), "acme", "ab" * 32, (Path("/s/publisher.pem"),))
SETTINGS = StackSettings()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def apply(spec: ServiceSpec, environment: pytest.MonkeyPatch) -> None:
    for name, value in spec.environment.items():
        environment.setenv(name, value)


def test_attestor(environment: pytest.MonkeyPatch) -> None:
    apply(attestor_spec(SETTINGS, 7401, STATE), environment)
    settings = attestor.load_settings([])
    assert settings.listen == "127.0.0.1:7401"
    assert settings.policy_file == STATE.policy_file
    assert settings.simulated_root_public_key == STATE.simulated_root_public_key


def test_coprocessor(environment: pytest.MonkeyPatch) -> None:
    apply(coprocessor_spec(SETTINGS, 7402, STATE, "127.0.0.1:7401", [ADAPTER]), environment)
    settings = he_lora.load_settings([])
    assert settings.packages == [ADAPTER.package]
    assert settings.publisher_keys == list(ADAPTER.publisher_keys)
    assert (settings.tenant, settings.attestor_thumbprint) == ("acme", "thumbprint")


@pytest.mark.parametrize("secret", [None, Path("/s/secret")])
def test_inference(environment: pytest.MonkeyPatch, secret: Path | None) -> None:
    options = {**ENGINE_OPTIONS, "base_name_answers": "adapter"}
    engine = EngineChoice("/models/base", options)
    spec = inference_spec(SETTINGS, 7403, STATE, "127.0.0.1:7401", "127.0.0.1:7402", [ADAPTER], engine, secret)
    apply(spec, environment)
    settings = inference.load_settings([])
    (connection,) = settings.adapters
    assert connection.name == "law" and connection.expected_digest == ADAPTER.digest
    assert connection.publisher_keys == ADAPTER.publisher_keys
    assert settings.dtype == "float32" and settings.base_name_answers == "adapter"
    assert settings.require_attestation is False
    assert settings.secret_file == secret


@pytest.mark.parametrize("file", [None, Path("/s/file")])
def test_gateway(environment: pytest.MonkeyPatch, file: Path | None) -> None:
    spec = gateway_spec(StackSettings(host="0.0.0.0"), 8000, 7404, "127.0.0.1:7403", file, file)
    apply(spec, environment)
    settings = gateway.load_settings([])
    assert settings.listen == "0.0.0.0:8000" and spec.address == "127.0.0.1:8000"
    assert settings.keys_file == settings.inference_secret_file == file


def test_tls(environment: pytest.MonkeyPatch) -> None:
    tls = TlsFiles(Path("/s/authority.pem"), Path("/s/secret"), Path("/s/tls"))
    engine = EngineChoice("/models/base", ENGINE_OPTIONS)
    specs = [
        attestor_spec(SETTINGS, 7401, STATE, tls),
        coprocessor_spec(SETTINGS, 7402, STATE, "127.0.0.1:7401", [ADAPTER], tls),
        inference_spec(SETTINGS, 7403, STATE, "127.0.0.1:7401", "127.0.0.1:7402", [ADAPTER], engine, None, tls),
        gateway_spec(SETTINGS, 8000, 7404, "127.0.0.1:7403", None, None, "127.0.0.1:7401", tls),
    ]
    for spec in specs:
        apply(spec, environment)
    assert attestor.load_settings([]).mutual_listen == "127.0.0.1:0"
    assert he_lora.load_settings([]).attestor_authority == tls.authority
    host = inference.load_settings([])
    assert host.attestor_authority == host.adapters[0].attestor_authority == tls.authority
    assert (host.tenant, host.attestor, host.attestor_thumbprint) == ("acme", "127.0.0.1:7401", "thumbprint")
    served = gateway.load_settings([])
    assert (served.attestor_authority, served.attestor, served.tls_dir) == (
        tls.authority,
        host.attestor,
        tls.gateway_dir,
    )
    assert served.enrolment_secret_file == tls.enrolment_secret
    health = [attestor.load_settings([]), he_lora.load_settings([]), host]
    assert [item.health_listen for item in health] == [spec.health_address for spec in specs[:3]]
    assert len({spec.health_address for spec in specs}) == 4


def test_unknown_variables_are_refused_by_name(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TENSAFE_STACK_PROT", "1")
    with pytest.raises(ConfigurationError, match="TENSAFE_STACK_PROT"):
        load_stack_settings()


def test_bad_values_are_refused_by_name(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="TENSAFE_STACK_PORT"):
        load_stack_settings(port=70000)


def test_ports() -> None:
    free = StackSettings(port=0, attestor_port=0, coprocessor_port=0, inference_port=0, gateway_admin_port=0)
    ports = choose_ports(free)
    assert len(set(ports.values())) == 5 and all(ports.values())
    same = free.model_copy(update={"port": ports["port"], "attestor_port": ports["port"]})
    with pytest.raises(ConfigurationError, match="another service too"):
        choose_ports(same)
