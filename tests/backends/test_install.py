"""Hooks land on exactly the layers that an adapter has groups for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.linear import LinearBase

from tensorguard.backends.vllm.hooks import ForwardPass, HookedLinearMethod
from tensorguard.backends.vllm.install import AttachedGroup, AttachedProjection, Attachment, install_hooks
from tensorguard.errors import BaseModelMismatchError, UnsupportedAdapterError

D, KV, INNER = 8, 4, 12


class Fused(LinearBase):
    """A fused layer's shape, without vLLM's distributed state."""

    def __init__(self, d_in: int, sizes: list[int]) -> None:
        torch.nn.Module.__init__(self)
        self.input_size, self.output_partition_sizes = d_in, sizes
        self.weight = torch.nn.Parameter(torch.zeros(sum(sizes), d_in), requires_grad=False)
        self.quant_method: Any = "original"


def model() -> torch.nn.Module:
    root = torch.nn.Module()
    root.model = torch.nn.Module()
    root.model.layers = torch.nn.ModuleList()
    for _ in range(2):
        layer = torch.nn.Module()
        layer.self_attn, layer.mlp = torch.nn.Module(), torch.nn.Module()
        layer.self_attn.qkv_proj = Fused(D, [D, KV, KV])
        layer.self_attn.o_proj = Fused(D, [D])
        layer.mlp.gate_up_proj = Fused(D, [INNER, INNER])
        layer.mlp.down_proj = Fused(INNER, [D])
        root.model.layers.append(layer)
    root.lm_head = Fused(D, [100])
    return root


def group(layer: int, name: str, d_in: int, *projections: tuple[str, int, int]) -> AttachedGroup:
    attached, offset = [], 0
    for projection, rank, d_out in projections:
        basis = np.arange(d_out * rank, dtype=np.float32).reshape(d_out, rank)
        attached.append(AttachedProjection(projection, offset, rank, basis))
        offset += rank
    return AttachedGroup(layer, name, d_in, tuple(attached))


def install(root: torch.nn.Module, *groups: AttachedGroup) -> int:
    attachment = Attachment("a", groups, source=None)  # type: ignore[arg-type]
    return install_hooks(root, [attachment], ForwardPass({}, torch.device("cpu"), 1.0))


def test_only_the_adapters_layers_are_hooked() -> None:
    root = model()
    count = install(
        root,
        group(0, "qkv", D, ("q_proj", 2, D), ("v_proj", 3, KV)),
        group(1, "down", INNER, ("down_proj", 2, D)),
    )
    hooked = {
        name for name, m in root.named_modules() if isinstance(getattr(m, "quant_method", None), HookedLinearMethod)
    }
    assert count == 2
    assert hooked == {"model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"}
    method = root.model.layers[0].self_attn.qkv_proj.quant_method
    q, v = method.bases["a"]
    assert (q.inputs, q.outputs) == (slice(0, 2), slice(0, D))
    assert (v.inputs, v.outputs) == (slice(2, 5), slice(D + KV, D + 2 * KV))
    assert v.basis.shape == (3, KV)
    assert v.basis[1, 2] == 2 * 3 + 1
    assert method.original == "original"


def test_full_mode_has_no_basis_and_must_fit_the_outputs() -> None:
    root = model()
    q, v = AttachedProjection("q_proj", 0, D, None), AttachedProjection("v_proj", D, KV, None)
    assert install(root, AttachedGroup(0, "qkv", D, (q, v))) == 1
    installed = root.model.layers[0].self_attn.qkv_proj.quant_method.bases["a"]
    assert [(p.inputs, p.outputs, p.basis) for p in installed] == [
        (slice(0, D), slice(0, D), None),
        (slice(D, D + KV), slice(D + KV, D + 2 * KV), None),
    ]
    for rank in (1, D - 1, D + 1):
        with pytest.raises(BaseModelMismatchError, match="q_proj"):
            install(model(), AttachedGroup(0, "qkv", D, (AttachedProjection("q_proj", 0, rank, None),)))


def test_two_adapters_share_a_hook() -> None:
    root = model()
    first = Attachment("a", (group(0, "o", D, ("o_proj", 2, D)),), source=None)  # type: ignore[arg-type]
    second = Attachment("b", (group(0, "o", D, ("o_proj", 4, D)),), source=None)  # type: ignore[arg-type]
    assert install_hooks(root, [first, second], ForwardPass({}, torch.device("cpu"), 1.0)) == 1
    bases = root.model.layers[0].self_attn.o_proj.quant_method.bases
    assert [len(bases[name][0].basis) for name in ("a", "b")] == [2, 4]


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
    root = model()
    with pytest.raises(error, match=text):
        install(root, group(1, "o", D, ("o_proj", 2, D)), bad)
    assert root.model.layers[1].self_attn.o_proj.quant_method == "original", "a refused adapter left hooks behind"
