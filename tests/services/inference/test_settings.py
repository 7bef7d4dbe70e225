"""Settings: what the launcher passes is understood, anything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.inference.settings import load_settings
from tensorguard.errors import ConfigurationError

CONNECTION = {
    "name": "a",
    "coprocessor_endpoint": "127.0.0.1:1",
    "attestor_endpoint": "127.0.0.1:2",
    "publisher_keys": ["publisher.pem"],
}


def test_environment_as_the_launcher_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "LISTEN": "127.0.0.1:0",
        "MODEL": "some/model",
        "ADAPTERS": json.dumps([{**CONNECTION, "tenant": "t", "publisher_keys": ["k.pem"]}]),
        "REQUIRE_ATTESTATION": "false",
        "SIMULATED_ROOT_KEY": "root.pem",
        "REFLECTION": "true",
        "BASE_NAME_ANSWERS": "adapter",
        "DTYPE": "float32",
        "MAX_MODEL_LEN": "1024",
        "ENABLE_PREFIX_CACHING": "False",
        "SPECULATIVE_METHOD": "ngram",
        "NUM_SPECULATIVE_TOKENS": "3",
    }.items():
        monkeypatch.setenv(f"TENSAFE_INFERENCE_{name}", value)
    settings = load_settings([])
    assert settings.adapters[0].publisher_keys == (Path("k.pem"),)
    assert (settings.require_attestation, settings.base_name_answers) == (False, "adapter")
    engine = settings.engine_options()
    assert (engine.max_model_len, engine.enable_prefix_caching, engine.num_speculative_tokens) == (1024, False, 3)
    assert load_settings(["--dtype", "bfloat16"]).dtype == "bfloat16"


def test_the_default_listens_on_loopback_and_wants_evidence() -> None:
    settings = load_settings(["--model", "m"])
    assert (settings.listen, settings.require_attestation) == ("127.0.0.1:7403", True)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("LISTEN", "nowhere", "listen"),
        ("ADAPTERS", "[{}]", "adapters"),
        ("ADAPTERS", "not json", "adapters"),
        ("ADAPTERS", json.dumps([{**CONNECTION, "publisher_keys": []}]), "publisher_keys"),
        ("ADAPTERS", json.dumps([{**CONNECTION, "secret": "x"}]), "secret"),
        ("DTYPE", "int4", "dtype"),
        ("TENSOR_PARALLEL_SIZE", "0", "--tensor-parallel-size"),
        ("SPECULATIVE_MODEL", "small", "num_speculative_tokens"),
        ("TRUST_REMOTE_CODE", "true", "trust_remote_code"),
        ("BASE_NAME_ANSWERS", "adapter", "base_name_answers"),
        ("POOL_BYTES", "-1", "--pool-bytes"),
        ("SHARED_MEMORY_BYTES", "5000", "--shared-memory-bytes"),
        ("NO_SUCH_OPTION", "1", "TENSAFE_INFERENCE_NO_SUCH_OPTION"),
    ],
)
def test_bad_settings_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, named: str) -> None:
    monkeypatch.setenv("TENSAFE_INFERENCE_MODEL", "m")
    monkeypatch.setenv(f"TENSAFE_INFERENCE_{name}", value)
    with pytest.raises(ConfigurationError, match=named):
        load_settings([])
