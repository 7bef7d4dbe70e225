"""Hooked layers inside a compiled model.

torch.compile and CUDA graphs record what a forward pass does once and repeat it; a call to a coprocessor cannot be
recorded. So a compiled model sees one opaque operation per hooked layer, `tensafe::hooked_linear(x, bias, out, name)`,
at which vLLM splits the graph: what lies between two of them is compiled (and on a GPU captured), the operation
itself runs as Python in every step, exactly as in eager mode. The result goes into a buffer that the graph before it
allocated, because replayed graphs read from fixed addresses.

The layer's own product is inside the operation. It is all that can overlap with the remote product (whatever comes
next needs the sum of both), and one operation splits the graph half as often as one before and one after it would.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from vllm.config import CompilationConfig, CompilationMode
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from tensorguard.errors import ConfigurationError

OPERATION = "tensafe::hooked_linear"

_library = torch.library.Library("tensafe", "FRAGMENT")


def hooked_linear(x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, name: str) -> None:
    """Write the hooked layer's output, deltas included, into `out` [tokens, d_out]."""
    layer = get_forward_context().no_compile_layers[name]
    out.copy_(layer.quant_method.compute(layer, x, bias))


def _hooked_linear_fake(x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, name: str) -> None:
    return


direct_register_custom_op(
    op_name=OPERATION.partition("::")[2],
    op_func=hooked_linear,
    mutates_args=["out"],
    fake_impl=_hooked_linear_fake,
    target_lib=_library,
)


def call_hooked_linear(layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None, name: str) -> torch.Tensor:
    """The operation as the model's code calls it while it is traced; returns the output [tokens, d_out]."""
    out = x.new_empty((*x.shape[:-1], sum(layer.output_partition_sizes)))
    torch.ops.tensafe.hooked_linear(x, bias, out, name)
    # A graph must not return the very tensor that an operation outside of it has changed.
    return out.view(out.shape)


def split_at_hooks(config: CompilationConfig) -> None:
    """Have vLLM split the graph at the operation; call before the model is built.

    Raises ConfigurationError for graphs that would contain it: replayed, they would leave the deltas out.
    """
    if config.cudagraph_mode is not None and config.cudagraph_mode.has_full_cudagraphs():
        raise ConfigurationError(
            f"cudagraph_mode={config.cudagraph_mode.name} captures hooked layers; use PIECEWISE or NONE"
        )
    if config.mode == CompilationMode.VLLM_COMPILE:
        if not config.splitting_ops or config.use_inductor_graph_partition:
            raise ConfigurationError(
                "hooked layers need a graph that is split at operations; leave splitting_ops and "
                "use_inductor_graph_partition at their defaults"
            )
        if OPERATION not in config.splitting_ops:
            config.splitting_ops.append(OPERATION)


def register_layers(model: torch.nn.Module, layers: MutableMapping[str, Any]) -> None:
    """Note the model's hooked layers where the operation finds them by name (`static_forward_context`)."""
    from tensorguard.backends.vllm.hooks import HookedLinearMethod

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, HookedLinearMethod):
            layers[method.name] = module
