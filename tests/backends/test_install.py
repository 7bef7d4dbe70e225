"""Hooks land on the decoder's fused layers, and adapters in the hooks of exactly the layers they have groups for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.fusion.quant_activation import get_input_quant_key
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from tensorguard.backends.vllm.hooks import ForwardPass, HookedLinearMethod
from tensorguard.backends.vllm.install import AttachedGroup, AttachedProjection, Attachment, Hooks, install_hooks
from tensorguard.errors import BaseModelMismatchError, UnsupportedAdapterError

D, KV, INNER = 8, 4, 12


class WithoutRanks:
    """A fused layer's shape, without vLLM's distributed state."""

    tp_size, tp_rank, num_kv_head_replicas = 1, 0, 1

    def __init__(self, d_in: int, sizes: list[int]) -> None:
        torch.nn.Module.__init__(self)  # type: ignore[arg-type]
        self.input_size, self.output_partition_sizes = d_in, sizes
        self.weight = torch.nn.Parameter(torch.zeros(sum(sizes), d_in), requires_grad=False)
        self.quant_method: Any = "original"


class Qkv(WithoutRanks, QKVParallelLinear):
    pass


class Merged(WithoutRanks, MergedColumnParallelLinear):
    pass


class Row(WithoutRanks, RowParallelLinear):
    pass


def model() -> torch.nn.Module:
    root = torch.nn.Module()
    root.model = torch.nn.Module()
    root.model.layers = torch.nn.ModuleList()
    for _ in range(2):
        layer = torch.nn.Module()
        layer.self_attn, layer.mlp = torch.nn.Module(), torch.nn.Module()
        layer.self_attn.qkv_proj = Qkv(D, [D, KV, KV])
        layer.self_attn.o_proj = Row(D, [D])
        layer.mlp.gate_up_proj = Merged(D, [INNER, INNER])
        layer.mlp.down_proj = Row(INNER, [D])
        root.model.layers.append(layer)
    root.lm_head = Row(D, [100])
    return root


def group(layer: int, name: str, d_in: int, *projections: tuple[str, int, int]) -> AttachedGroup:
    attached, offset = [], 0
    for projection, rank, d_out in projections:
        basis = np.arange(d_out * rank, dtype=np.float32).reshape(d_out, rank)
        attached.append(AttachedProjection(projection, offset, rank, basis))
        offset += rank
    return AttachedGroup(layer, name, d_in, tuple(attached))


def hooked(root: torch.nn.Module) -> Hooks:
    return install_hooks(root, ForwardPass({}, torch.device("cpu"), 1.0))


def attach(hooks: Hooks, *groups: AttachedGroup, key: str = "a") -> None:
    hooks.add(hooks.fit(Attachment(key, groups, source="source")))  # type: ignore[arg-type]


def names_of_hooked(root: torch.nn.Module) -> set[str]:
    return {
        name for name, m in root.named_modules() if isinstance(getattr(m, "quant_method", None), HookedLinearMethod)
    }


def test_every_fused_layer_of_the_decoder_is_hooked() -> None:
    root = model()
    hooks = hooked(root)
    assert names_of_hooked(root) == {
        f"model.layers.{number}.{name}"
        for number in range(2)
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    assert len(hooks.methods) == 8
    assert root.model.layers[0].self_attn.qkv_proj.quant_method.original == "original"


def test_hooked_layers_get_activations_as_they_are() -> None:
    root = model()
    hooked(root)
    for layer in (root.model.layers[0].self_attn.o_proj, root.lm_head):
        layer._input_quant_key = "quantised"
    assert get_input_quant_key(root.lm_head) == "quantised"
    assert get_input_quant_key(root.model.layers[0].self_attn.o_proj) is None


def test_layers_of_vision_experts_and_drafts_are_not_the_decoders() -> None:
    root, text = torch.nn.Module(), model()
    root.language_model = text
    root.vision_tower = torch.nn.Module()
    root.vision_tower.vision_model = model().model
    root.draft_model = model()
    expert = torch.nn.Module()
    expert.down_proj = Row(INNER, [D])
    text.model.layers[0].mlp.shared_expert = expert
    text.model.layers[1].mlp.experts = torch.nn.ModuleList([expert])
    hooked(root)
    found = names_of_hooked(root)
    assert len(found) == 8
    assert all(name.startswith("language_model.model.layers.") and "expert" not in name for name in found)


def test_an_adapter_is_put_into_its_layers_and_out_again() -> None:
    root = model()
    hooks = hooked(root)
    attach(
        hooks,
        group(0, "qkv", D, ("q_proj", 2, D), ("v_proj", 3, KV)),
        group(1, "down", INNER, ("down_proj", 2, D)),
    )
    assert {site for site, method in hooks.methods.items() if method.bases} == {(0, "qkv"), (1, "down")}
    assert hooks.forward_pass.sources == {"a": "source"}
    q, v = root.model.layers[0].self_attn.qkv_proj.quant_method.bases["a"]
    assert (q.inputs, q.outputs) == (slice(0, 2), slice(0, D))
    assert (v.inputs, v.outputs) == (slice(2, 5), slice(D + KV, D + 2 * KV))
    assert v.basis.shape == (3, KV)
    assert v.basis[1, 2] == 2 * 3 + 1
    hooks.remove("a")
    assert not any(method.bases for method in hooks.methods.values())
    assert not hooks.forward_pass.sources


def test_full_mode_has_no_basis_and_must_fit_the_outputs() -> None:
    hooks = hooked(model())
    q, v = AttachedProjection("q_proj", 0, D, None), AttachedProjection("v_proj", D, KV, None)
    attach(hooks, AttachedGroup(0, "qkv", D, (q, v)))
    assert [(p.inputs, p.outputs, p.basis) for p in hooks.methods[0, "qkv"].bases["a"]] == [
        (slice(0, D), slice(0, D), None),
        (slice(D, D + KV), slice(D + KV, D + 2 * KV), None),
    ]
    for rank in (1, D - 1, D + 1):
        with pytest.raises(BaseModelMismatchError, match="q_proj"):
            attach(hooked(model()), AttachedGroup(0, "qkv", D, (AttachedProjection("q_proj", 0, rank, None),)))


def test_two_adapters_share_a_hook() -> None:
    hooks = hooked(model())
    for key, rank in (("a", 2), ("b", 4)):
        attach(hooks, group(0, "o", D, ("o_proj", rank, D)), key=key)
    bases = hooks.methods[0, "o"].bases
    assert [len(bases[key][0].basis) for key in ("a", "b")] == [2, 4]
    hooks.remove("a")
    assert list(bases) == ["b"]


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (group(2, "o", D, ("o_proj", 2, D)), UnsupportedAdapterError, "layer 2"),
        (group(0, "o", D + 1, ("o_proj", 2, D)), BaseModelMismatchError, "d_in"),
        (group(0, "o", D, ("o_proj", 2, D + 1)), BaseModelMismatchError, "o_proj"),
        (group(0, "qkv", D, ("k_proj", 2, D)), BaseModelMismatchError, "k_proj"),
        (group(0, "qkv", D, ("o_proj", 2, D)), UnsupportedAdapterError, "o_proj"),
    ],
)
def test_an_adapter_for_another_model_is_refused(bad: AttachedGroup, error: type[Exception], text: str) -> None:
    hooks = hooked(model())
    with pytest.raises(error, match=text):
        attach(hooks, group(1, "o", D, ("o_proj", 2, D)), bad)
    assert not any(method.bases for method in hooks.methods.values()), "a refused adapter was attached in part"


def test_an_adapter_of_dense_layers_does_not_fit_layers_of_experts() -> None:
    root = model()
    root.model.layers[1].mlp = torch.nn.Module()
    root.model.layers[1].mlp.experts = Row(D, [INNER])
    with pytest.raises(UnsupportedAdapterError, match=r"'gate_up' in layer 1.*experts"):
        attach(hooked(root), group(1, "gate_up", D, ("up_proj", 2, INNER)))


@pytest.mark.parametrize(
    ("layer", "text"),
    [(Row(D, [2 * INNER]), "is a Row, not a MergedColumnParallelLinear"), (Merged(D, [1, 2, 3]), "has 3 parts")],
)
def test_a_layer_that_is_fused_differently_is_named(layer: torch.nn.Module, text: str) -> None:
    root = model()
    root.model.layers[1].mlp.gate_up_proj = layer
    hooks = hooked(root)
    assert len(hooks.methods) == 7
    assert layer.quant_method == "original"
    with pytest.raises(UnsupportedAdapterError, match=rf"'gate_up' in layer 1.*{text}"):
        attach(hooks, group(1, "gate_up", D, ("up_proj", 2, INNER)))
