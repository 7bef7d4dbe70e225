"""Every option that cannot be honoured is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensorguard.backends.vllm.config import (
    AdapterConnection,
    TenSafeVLLMConfig,
    WorkerSettings,
    resolve_model_path,
)
from tensorguard.backends.vllm.options import EngineOptions
from tensorguard.errors import ConfigurationError, NotFoundError

PACKAGE = "the package"
DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "vllm.md"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.tssp"
    path.write_bytes(b"")
    return path


def test_the_guides_configuration_is_accepted(package: Path) -> None:
    config = TenSafeVLLMConfig(
        model="meta-llama/Llama-3-8B-Instruct",
        tssp_package_path=str(package),
        enable_he_lora=True,
        he_scheme="ckks",
    )
    assert config.require_attestation is None
    assert config.gpu_memory_utilization == 0.9
    assert config.base_name == "meta-llama/Llama-3-8B-Instruct"


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, None),
        ({"speculative_model": "s", "num_speculative_tokens": 2}, "draft_model"),
        ({"speculative_method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}, "ngram"),
        ({"enforce_eager": False}, None),
        ({"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_model_len": 128}, None),
    ],
)
def test_modes_are_accepted(package: Path, options: dict[str, Any], method: str | None) -> None:
    config = TenSafeVLLMConfig(model="m", tssp_package_path=package, enable_he_lora=True, **options)
    assert config.speculation == method


@pytest.mark.parametrize("name", EngineOptions.model_fields)
def test_every_engine_option_is_documented(name: str) -> None:
    assert EngineOptions.model_fields[name].description
    assert f"| `{name}` |" in DOCUMENTATION.read_text()


def test_several_adapters_are_packages_or_connections(package: Path) -> None:
    connection = {"name": "b", "coprocessor_endpoint": "c:1", "attestor_endpoint": "a:1", "publisher_keys": ["k"]}
    config = TenSafeVLLMConfig(model="m", enable_he_lora=True, adapters=[str(package), connection])
    assert config.adapters == (package, AdapterConnection(**connection))
    assert not config.simulated_evidence_permitted
    assert TenSafeVLLMConfig(model="m", enable_he_lora=True, adapters=[package]).simulated_evidence_permitted


def test_a_base_model_alone_is_a_configuration() -> None:
    assert not TenSafeVLLMConfig(model="m").enable_he_lora


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"he_scheme": "bfv"}, "he_scheme"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"quantization": "A B"}, "quantization"),
        ({"max_num_batched_tokens": 4, "max_num_seqs": 8}, "max_num_seqs"),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 64, "max_model_len": 128},
            "enable_chunked_prefill",
        ),
        ({"speculative_method": "eagle", "num_speculative_tokens": 2}, "speculative_method"),
        ({"speculative_method": "ngram"}, "num_speculative_tokens"),
        ({"speculative_model": "small"}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 2}, "speculative_method"),
        ({"prompt_lookup_max": 3}, "speculative_method"),
        ({"speculative_method": "draft_model", "num_speculative_tokens": 2}, "speculative_model"),
        ({"speculative_method": "ngram", "speculative_model": "s", "num_speculative_tokens": 2}, "speculative_model"),
        ({"speculative_model": "s", "num_speculative_tokens": 2, "prompt_lookup_min": 2}, "prompt_lookup_min"),
        (
            {
                "speculative_method": "ngram",
                "num_speculative_tokens": 2,
                "prompt_lookup_min": 4,
                "prompt_lookup_max": 3,
            },
            "prompt_lookup_max",
        ),
        ({"gpu_memory_utilisation": 0.5}, "gpu_memory_utilisation"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"dtype": "int8"}, "dtype"),
        ({"model": ""}, "model"),
        ({"adapter_name": "a b"}, "adapter_name"),
        ({"adapter_name": "m"}, "adapter_name"),
        ({"tssp_package_path": None}, "tssp_package_path"),
        ({"tssp_package_path": "/nowhere/a.tssp"}, "tssp_package_path"),
        ({"tssp_package_path": None, "coprocessor_endpoint": "c:1", "attestor_endpoint": "a:1"}, "adapter_name"),
        ({"coprocessor_endpoint": "c:1"}, "attestor_endpoint"),
        ({"coprocessor_endpoint": "c:1", "attestor_endpoint": "a:1"}, "publisher_keys"),
        ({"attestor_endpoint": "a:1"}, "coprocessor_endpoint"),
        ({"attestor_authority": "authority.pem"}, "attestor_authority"),
        ({"enable_he_lora": False}, "tssp_package_path"),
        ({"enable_he_lora": False, "tssp_package_path": None, "adapters": ["a.tssp"]}, "adapters"),
        ({"adapters": ["/nowhere/b.tssp"]}, "adapters"),
        ({"tssp_package_path": None, "adapters": [PACKAGE], "adapter_name": "a"}, "adapter_name"),
        ({"tssp_package_path": None, "adapters": [PACKAGE], "base_name_answers": "adapter"}, "base_name_answers"),
        ({"enable_he_lora": False, "tssp_package_path": None, "base_name_answers": "adapter"}, "base_name_answers"),
        ({"enable_he_lora": False, "tssp_package_path": None, "he_checked_mode": True}, "he_checked_mode"),
        ({"base_name_answers": "both"}, "base_name_answers"),
        ({"delta_timeout_seconds": 0}, "delta_timeout_seconds"),
    ],
)
def test_what_is_refused_is_named(package: Path, options: dict[str, Any], named: str) -> None:
    good = {"model": "m", "tssp_package_path": package, "enable_he_lora": True}
    TenSafeVLLMConfig(**good)
    if PACKAGE in options.get("adapters", ()):
        options = {**options, "adapters": [package]}
    with pytest.raises(ConfigurationError, match=named):
        TenSafeVLLMConfig(**{**good, **options})


def test_a_refusal_does_not_repeat_the_value(package: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        TenSafeVLLMConfig(model="m", api_key="hunter2")
    assert "hunter2" not in str(caught.value)


def test_settings_survive_the_way_into_the_worker(tmp_path: Path) -> None:
    settings = WorkerSettings(model_path=tmp_path, simulated_root_key=tmp_path / "root.pem")
    assert WorkerSettings.model_validate(settings.model_dump(mode="json")) == settings
    connection = AdapterConnection(
        name="a",
        coprocessor_endpoint="c:1",
        attestor_endpoint="a:1",
        publisher_keys=(tmp_path / "k",),
        publisher_pems=("pem",),
        expected_digest="ab" * 32,
        checked=True,
    )
    assert AdapterConnection.model_validate(connection.model_dump(mode="json")) == connection
    for sent in (settings, connection):
        with pytest.raises(ValueError, match="secret"):
            type(sent).model_validate({**sent.model_dump(mode="json"), "secret": "x"})


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"config\.json"):
        resolve_model_path(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_path(str(tmp_path)) == tmp_path.resolve()


def test_a_missing_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="nobody/nothing"):
        resolve_model_path("nobody/nothing")
