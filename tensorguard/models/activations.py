"""What the adapted layers of a base model are given: activations captured from plain transformers, float32.

For benchmarks and examples that must not rest on synthetic inputs. torch and transformers are imported when the model
is loaded, not with this module.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tensorguard.errors import InvalidInputError
from tensorguard.models.reference import ReferenceModel

_INPUTS = {
    "qkv": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "gate_up": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
"""The projection whose input is that of its whole group."""

Activations = dict[tuple[int, str], npt.NDArray[np.float32]]


def capture(
    model_dir: Path | str,
    chats: Sequence[Sequence[dict[str, str]]],
    max_tokens: int,
    groups: Collection[tuple[int, str]] | None = None,
) -> Activations:
    """(layer, group) -> float32 [tokens, d_in] for at most ``max_tokens`` tokens of these chats, taken evenly.

    ``groups`` limits what is kept. Raises ConfigurationError when the model or a library is missing and
    InvalidInputError when the chats hold no tokens.
    """
    reference = ReferenceModel(model_dir)
    import torch

    kept: dict[tuple[int, str], list[npt.NDArray[np.float32]]] = {}
    handles = []
    for number, layer in enumerate(reference.model.model.layers):
        for group, path in _INPUTS.items():
            if groups is None or (number, group) in groups:
                rows = kept.setdefault((number, group), [])
                handles.append(layer.get_submodule(path).register_forward_pre_hook(_keep(rows)))
    try:
        with torch.no_grad():
            for chat in chats:
                text = reference.tokenizer.apply_chat_template(list(chat), tokenize=False)
                ids = reference.tokenizer(text, add_special_tokens=False).input_ids
                reference.model(torch.tensor([ids]))
    finally:
        for handle in handles:
            handle.remove()
    if not any(kept.values()) or max_tokens < 1:
        raise InvalidInputError("no activations were captured: give chats, groups of this model and max_tokens >= 1")
    whole = {key: np.concatenate(rows) for key, rows in kept.items()}
    count = len(next(iter(whole.values())))
    chosen = np.unique(np.linspace(0, count - 1, min(count, max_tokens)).astype(np.int64))
    return {key: rows[chosen] for key, rows in whole.items()}


def _keep(rows: list[npt.NDArray[np.float32]]) -> Any:
    def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
        rows.append(inputs[0][0].float().numpy().copy())

    return hook
