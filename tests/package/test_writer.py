"""Packing: what is published, what is refused, and that nothing is left behind when it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorguard.errors import (
    BaseModelMismatchError,
    ConfigurationError,
    InvalidInputError,
    MissingWeightsError,
    NotFoundError,
    PermissionDeniedError,
    PrivacyBoundError,
    UnsupportedAdapterError,
)
from tensorguard.models.identity import base_model_identity
from tensorguard.package.base_model import check_base_model
from tensorguard.package.reader import read_adapter
from tensorguard.package.writer import pack_adapter
from tensorguard.store.state import AttestorState
from tests.package.conftest import Packed
from tests.support.adapters import adapter_config, adapter_tensors, write_adapter, write_base_model


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_manifest_says_what_was_packed(packed: Packed) -> None:
    manifest = packed.verified.manifest
    assert (manifest.tenant, manifest.package_id, manifest.sequence) == ("acme", "law-style", 1)
    assert manifest.peft.target_modules == ("down_proj", "q_proj", "v_proj")
    assert manifest.moai.parameter_set == "n4096-q90-w12"
    assert manifest.moai.rotations == manifest.moai.evaluation_keys == 0
    assert [(group.layer, group.group) for group in manifest.moai.groups] == [
        (0, "qkv"),
        (0, "down"),
        (1, "qkv"),
        (1, "down"),
    ]
    assert manifest.expires - manifest.created == 365 * 24 * 3600


def test_the_file_shows_no_weights(packed: Packed) -> None:
    content = packed.path.read_bytes()
    contents = read_adapter(packed.path, packed.verified, packed.content_key)
    for group in contents.groups:
        assert group.integers.astype("<i2")[0, :8].tobytes() not in content
    assert contents.u[-64:] not in content
    assert packed.content_key not in content


def test_bounds_are_published_not_measurements(packed: Packed) -> None:
    # Exact norms or errors would tell about the weights; powers of two and fixed limits do not.
    for group in packed.verified.manifest.moai.groups:
        assert group.error_bound == 2.0**-9
        assert group.norm_bound == 2**12 * np.sqrt(group.d_in * 4)


def test_packing_twice_gives_other_keys_bases_and_weights(packed: Packed, tmp_path: Path) -> None:
    registry = AttestorState.open(tmp_path / "state").packages
    again = pack_adapter(
        packed.adapter, tmp_path / "x.tssp", **packed.arguments(sequence=1, key_registrar=registry.register)
    )
    assert again.manifest.key_id != packed.verified.manifest.key_id
    key = registry.lookup("acme", "law-style", 1, again.digest).content_key
    first = read_adapter(packed.path, packed.verified, packed.content_key)
    second = read_adapter(tmp_path / "x.tssp", again, key)
    assert first.u != second.u
    assert not np.array_equal(first.groups[0].integers, second.groups[0].integers)


@pytest.mark.parametrize("sequence", [1])
def test_a_used_sequence_leaves_no_file(packed: Packed, tmp_path: Path, sequence: int) -> None:
    with pytest.raises(PermissionDeniedError):
        pack_adapter(packed.adapter, tmp_path / "x.tssp", **packed.arguments(sequence=sequence))
    assert files(tmp_path) == []


def test_a_registrar_that_fails_leaves_no_file(packed: Packed, tmp_path: Path) -> None:
    def refuse(**_: Any) -> None:
        raise NotFoundError("no attestor")

    with pytest.raises(NotFoundError):
        pack_adapter(packed.adapter, tmp_path / "x.tssp", **packed.arguments(key_registrar=refuse))
    assert files(tmp_path) == []


def test_existing_files_are_not_overwritten(packed: Packed) -> None:
    before = packed.path.read_bytes()
    with pytest.raises(ConfigurationError, match="exists already"):
        pack_adapter(packed.adapter, packed.path, **packed.arguments())
    assert packed.path.read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [{"tenant": "A"}, {"package_id": ""}, {"sequence": 0}, {"token_budget": 0}, {"life_seconds": 0}],
)
def test_bad_options(packed: Packed, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        pack_adapter(packed.adapter, tmp_path / "x.tssp", **packed.arguments(**changes))


def test_unknown_parameter_sets(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="unknown parameter set"):
        pack_adapter(packed.adapter, tmp_path / "x.tssp", **packed.arguments(parameter_set="n1024"))


def test_chosen_parameter_sets(packed: Packed, tmp_path: Path) -> None:
    registry = AttestorState.open(tmp_path / "state").packages
    arguments = packed.arguments(parameter_set="n4096-q90-w14", key_registrar=registry.register)
    wider = pack_adapter(packed.adapter, tmp_path / "x.tssp", **arguments).manifest.moai
    assert wider.parameter_set == "n4096-q90-w14"
    assert wider.total_variation_log2 > packed.verified.manifest.moai.total_variation_log2


def test_a_token_budget_over_the_privacy_bound_is_refused(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(PrivacyBoundError, match="token budget"):
        pack_adapter(packed.adapter, tmp_path / "x.tssp", **packed.arguments(privacy_bound_log2=-60))
    with pytest.raises(PrivacyBoundError, match="token budget"):
        pack_adapter(packed.adapter, tmp_path / "x.tssp", **packed.arguments(token_budget=2**52))
    assert files(tmp_path) == []


def test_adapters_the_contract_does_not_allow(packed: Packed, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "dora", config=adapter_config(use_dora=True))
    with pytest.raises(UnsupportedAdapterError, match="use_dora"):
        pack_adapter(folder, tmp_path / "x.tssp", **packed.arguments())


def test_adapters_for_another_model(packed: Packed, tmp_path: Path) -> None:
    other = write_base_model(tmp_path / "model", hidden_size=64)
    with pytest.raises(UnsupportedAdapterError, match="another model"):
        pack_adapter(packed.adapter, tmp_path / "x.tssp", **packed.arguments(base_model_dir=other))
    deeper = write_base_model(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(MissingWeightsError, match="layer 2"):
        pack_adapter(packed.adapter, tmp_path / "x.tssp", **packed.arguments(base_model_dir=deeper))
    with pytest.raises(ConfigurationError):
        pack_adapter(packed.adapter, tmp_path / "x.tssp", **packed.arguments(base_model_dir=tmp_path / "absent"))


def test_an_adapter_without_effect_packs(packed: Packed, tmp_path: Path) -> None:
    tensors = {name: value * ("lora_A" in name) for name, value in adapter_tensors().items()}
    registry = AttestorState.open(tmp_path / "state").packages
    verified = pack_adapter(
        write_adapter(tmp_path / "zero", tensors),
        tmp_path / "x.tssp",
        **packed.arguments(key_registrar=registry.register),
    )
    key = registry.lookup("acme", "law-style", 2, verified.digest).content_key
    assert not any(group.integers.any() for group in read_adapter(tmp_path / "x.tssp", verified, key).groups)


def test_bound_to_the_base_model(packed: Packed, tmp_path: Path) -> None:
    manifest = packed.verified.manifest
    check_base_model(manifest, base_model_identity(packed.base_model))
    other = write_base_model(tmp_path / "model")
    check_base_model(manifest, base_model_identity(other))  # a copy under another name is the same model
    (other / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0}}}))
    with pytest.raises(BaseModelMismatchError, match="another tokenizer"):
        check_base_model(manifest, base_model_identity(other))
    other = write_base_model(tmp_path / "model", rope_theta=1000)
    with pytest.raises(BaseModelMismatchError, match="another config"):
        check_base_model(manifest, base_model_identity(other))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(BaseModelMismatchError, match="another config and another weights"):
        check_base_model(manifest, base_model_identity(other))
