"""Settings of all services: the same rules, and each its own variables."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic_settings import BaseSettings

from services.attestor import settings as attestor
from services.gateway import settings as gateway
from services.he_lora import settings as he_lora
from services.inference import settings as inference
from tensorguard.errors import ConfigurationError

LOADERS: dict[str, tuple[Callable[[list[str]], BaseSettings], dict[str, str]]] = {
    "ATTESTOR": (attestor.load_settings, {"STATE_DIR": "s", "POLICY_FILE": "p"}),
    "GATEWAY": (gateway.load_settings, {}),
    "HE_LORA": (he_lora.load_settings, {"PACKAGES": '["a"]', "PUBLISHER_KEYS": '["k"]', "TENANT": "t"}),
    "INFERENCE": (inference.load_settings, {"MODEL": "m"}),
}
Load = Callable[[list[str]], BaseSettings]


@pytest.fixture(params=LOADERS)
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Load]:
    """Prefix of a service's variables and its loader; the variables that it needs are set."""
    load, needed = LOADERS[request.param]
    prefix = f"TENSAFE_{request.param}_"
    for name, value in needed.items():
        monkeypatch.setenv(prefix + name, value)
    return prefix, load


def test_variables_are_read_and_options_win(service: tuple[str, Load], monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, load = service
    monkeypatch.setenv(f"{prefix}LISTEN", "127.0.0.1:1")
    monkeypatch.setenv(f"{prefix}REFLECTION", "true")
    assert load([]).model_dump(include={"listen", "reflection"}) == {"listen": "127.0.0.1:1", "reflection": True}
    options = ["--listen", "[::1]:2", "--no-reflection"]
    assert load(options).model_dump(include={"listen", "reflection"}) == {"listen": "[::1]:2", "reflection": False}


@pytest.mark.parametrize("name", ["LISTN", "REFLECTION_", "reflectoin"])
def test_unknown_variables_are_refused_by_name(
    service: tuple[str, Load], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    prefix, load = service
    monkeypatch.setenv(prefix + name, "x")
    with pytest.raises(ConfigurationError, match=f"unknown environment variable {prefix}{name}"):
        load([])


@pytest.mark.parametrize("name", ["TENSAFE_REFLECTION", "TENSAFE_HELORA_TENANT", "tensafe_infrence_dtype"])
def test_variables_that_no_service_reads_are_refused_by_name(
    service: tuple[str, Load], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigurationError, match=f"unknown environment variable {name}"):
        service[1]([])


def test_services_may_share_an_environment(service: tuple[str, Load], monkeypatch: pytest.MonkeyPatch) -> None:
    for prefix, (_, needed) in LOADERS.items():
        for name, value in needed.items():
            monkeypatch.setenv(f"TENSAFE_{prefix}_{name}", value)
    for name in ("TENSAFE_STACK_PORT", "TENSAFE_API_KEY", "TENSAFE_PORT"):
        monkeypatch.setenv(name, "1")
    service[1]([])


def test_wrong_values_are_named_and_not_repeated(service: tuple[str, Load], monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, load = service
    monkeypatch.setenv(f"{prefix}LISTEN", "hunter2 hunter2")
    with pytest.raises(ConfigurationError) as refused:
        load([])
    assert f"--listen (or {prefix}LISTEN): " in refused.value.message
    assert "hunter2" not in refused.value.message


@pytest.mark.parametrize("name", ["TENSAFE_HE_LORA_PACKAGES", "TENSAFE_INFERENCE_ADAPTERS"])
def test_a_list_that_is_not_json_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for prefix, (_, needed) in LOADERS.items():
        for key, value in needed.items():
            monkeypatch.setenv(f"TENSAFE_{prefix}_{key}", value)
    monkeypatch.setenv(name, "hunter2")
    load = he_lora.load_settings if "HE_LORA" in name else inference.load_settings
    with pytest.raises(ConfigurationError, match=name.rpartition("_")[2].lower()) as refused:
        load([])
    assert "hunter2" not in refused.value.message


def test_every_problem_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSAFE_INFERENCE_ADAPTERS", '[{"name": "a b"}]')
    with pytest.raises(ConfigurationError) as refused:
        inference.load_settings([])
    for part in ("--model (or TENSAFE_INFERENCE_MODEL)", "0.name", "0.coprocessor_endpoint", "0.attestor_endpoint"):
        assert part in refused.value.message
