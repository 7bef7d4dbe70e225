"""Reading PEFT folders: what is understood, and that everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorguard.errors import MissingWeightsError, UnsupportedAdapterError
from tensorguard.lora.adapter import LoraAdapter
from tests.support.adapters import adapter_config, adapter_tensors, module_path, write_adapter

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
MODEL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


def load(tmp_path: Path, tensors: Any = None, **changes: Any) -> LoraAdapter:
    return LoraAdapter.load(write_adapter(tmp_path / "adapter", tensors, adapter_config(**changes)))


def test_loads_a_peft_folder(tmp_path: Path) -> None:
    adapter = load(tmp_path)
    assert sorted(adapter.modules) == [(layer, name) for layer in (0, 1) for name in ("down_proj", "q_proj", "v_proj")]
    assert (adapter.rank, adapter.alpha, adapter.scaling) == (4, 8.0, 2.0)
    module = adapter.modules[0, "q_proj"]
    assert (module.rank, module.d_in, module.d_out, module.scaling) == (4, 48, 48, 2.0)
    np.testing.assert_array_equal(module.A, adapter_tensors()[Q0 + "A.weight"])
    adapter.check_model(MODEL)


def test_rank_stabilised_scaling(tmp_path: Path) -> None:
    assert load(tmp_path, use_rslora=True).modules[0, "q_proj"].scaling == 8.0 / 2.0


def test_rank_and_alpha_patterns(tmp_path: Path) -> None:
    tensors = adapter_tensors()
    for name in list(tensors):
        if ".1." in name and "q_proj" in name:
            tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]
    adapter = load(
        tmp_path,
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        rank_pattern={"model.layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 6, "layers.1.self_attn.q_proj": 1.5},
    )
    assert adapter.modules[1, "q_proj"].rank == 2
    assert adapter.modules[1, "q_proj"].scaling == 0.75
    assert adapter.modules[0, "q_proj"].scaling == 2.0
    assert adapter.modules[0, "v_proj"].scaling == 1.5


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_is_widened_exactly(tmp_path: Path, kind: str) -> None:
    folder = write_adapter(tmp_path / "adapter")
    values, header, data = {}, {}, b""
    for name, tensor in adapter_tensors().items():
        if kind == "F16":
            raw = tensor.astype("<f2")
            values[name] = raw.astype(np.float32)
        else:
            raw = (tensor.view(np.uint32) >> 16).astype("<u2")
            values[name] = (raw.astype(np.uint32) << 16).view(np.float32)
        header[name] = {
            "dtype": kind,
            "shape": tensor.shape,
            "data_offsets": [len(data), len(data) + raw.nbytes],
        }
        data += raw.tobytes()
    head = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    module = LoraAdapter.load(folder).modules[0, "q_proj"]
    np.testing.assert_array_equal(module.A, values[Q0 + "A.weight"])
    assert module.A.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("a_feature_of_the_future", {"on": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("r", 0),
        ("r", 129),
        ("r", "4"),
        ("r", True),
        ("lora_alpha", 0),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("use_rslora", "yes"),
        ("target_modules", "all-linear"),
        ("target_modules", []),
        ("rank_pattern", {"q_proj": 200}),
        ("rank_pattern", {".*q_proj": 2}),
        ("alpha_pattern", {"(a+)+$": 2}),
        ("alpha_pattern", [1]),
        ("layers_to_transform", ["0"]),
        ("layers_to_transform", [-1]),
    ],
)
def test_refuses_by_name(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(UnsupportedAdapterError, match=name):
        load(tmp_path, **{name: value})


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_options_that_are_off_are_accepted(tmp_path: Path, value: Any) -> None:
    load(tmp_path, a_feature_of_the_future=value)


@pytest.mark.parametrize(
    "target",
    [
        "embed_tokens",
        "lm_head",
        "qkv_proj",
        "experts",
        "router",
        "gate",
        "mlp.experts.3.w1",
        "block_sparse_moe",
        "vision_tower.encoder.layers.0.self_attn.out_proj",
        "multi_modal_projector",
        "fc1",
    ],
)
def test_refuses_modules_that_cannot_be_adapted(tmp_path: Path, target: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=target):
        load(tmp_path, target_modules=["q_proj", "v_proj", "down_proj", target])


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.layers.0.mlp.experts.3.down_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.experts.down_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.shared_expert.down_proj.lora_A.weight",
        "base_model.model.model.layers.0.block_sparse_moe.experts.0.w2.lora_A.weight",
        "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.vision_model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight",
        "base_model.model.model.multi_modal_projector.linear_1.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        Q0 + "magnitude_vector",
        "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
        "base_model.model.model.layers.9999.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight",
    ],
)
def test_refuses_weights_beyond_the_contract(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match="the adapter holds"):
        load(tmp_path, adapter_tensors() | {name: np.zeros((4, 48), np.float32)})


@pytest.mark.parametrize("half", ["A", "B"])
def test_missing_halves(tmp_path: Path, half: str) -> None:
    tensors = adapter_tensors()
    del tensors[f"{Q0}{half}.weight"]
    with pytest.raises(MissingWeightsError, match=f"q_proj has no lora_{half}"):
        load(tmp_path, tensors)


def test_missing_modules_and_layers(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="o_proj has no weights"):
        load(tmp_path, target_modules=["q_proj", "v_proj", "down_proj", "o_proj"])
    tensors = {name: value for name, value in adapter_tensors().items() if "layers.1.mlp" not in name}
    with pytest.raises(MissingWeightsError, match="down_proj has no weights in layer 1"):
        load(tmp_path, tensors)
    with pytest.raises(MissingWeightsError, match="in layer 2"):
        load(tmp_path, layers_to_transform=[0, 1, 2])
    with pytest.raises(UnsupportedAdapterError, match="holds layer 1"):
        load(tmp_path, layers_to_transform=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_numbers_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    tensors = adapter_tensors()
    tensors[Q0 + "A.weight"][1, 2] = bad
    with pytest.raises(UnsupportedAdapterError, match="NaN or infinite"):
        load(tmp_path, tensors)


@pytest.mark.parametrize("shape", [(5, 48), (4,), (4, 0), (0, 48)])
def test_refuses_shapes_that_do_not_fit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedAdapterError, match="expected"):
        load(tmp_path, adapter_tensors() | {Q0 + "A.weight": np.zeros(shape, np.float32)})


def test_refuses_other_types_and_files(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match="has type F64"):
        load(tmp_path, adapter_tensors() | {Q0 + "A.weight": np.zeros((4, 48))})
    folder = tmp_path / "adapter"
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04 pickle")
    with pytest.raises(UnsupportedAdapterError, match="not a safetensors file"):
        LoraAdapter.load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingWeightsError, match="save_pretrained"):
        LoraAdapter.load(folder)
    for text in ("[]", "{", "[" * 100_000, json.dumps("x" * 2_000_000)):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(UnsupportedAdapterError, match="JSON object"):
            LoraAdapter.load(folder)
    with pytest.raises(MissingWeightsError, match=r"adapter_config\.json"):
        LoraAdapter.load(tmp_path / "absent")


def test_check_model(tmp_path: Path) -> None:
    adapter = load(tmp_path)
    with pytest.raises(MissingWeightsError, match="layer 2"):
        adapter.check_model(MODEL | {"num_hidden_layers": 3})
    with pytest.raises(UnsupportedAdapterError, match="has 1 layers"):
        adapter.check_model(MODEL | {"num_hidden_layers": 1})
    with pytest.raises(UnsupportedAdapterError, match="for another model"):
        adapter.check_model(MODEL | {"intermediate_size": 96})
    with pytest.raises(UnsupportedAdapterError, match="num_hidden_layers"):
        adapter.check_model({key: value for key, value in MODEL.items() if key != "num_hidden_layers"})
    load(tmp_path, layers_to_transform=[0, 1]).check_model(MODEL | {"num_hidden_layers": 3})


def test_layer_specific_targets(tmp_path: Path) -> None:
    tensors = {name: value for name, value in adapter_tensors().items() if "layers.1" not in name}
    targets = [module_path(0, name) for name in ("q_proj", "v_proj", "down_proj")]
    adapter = load(tmp_path, tensors, target_modules=targets)
    adapter.check_model(MODEL)
    assert {layer for layer, _ in adapter.modules} == {0}
