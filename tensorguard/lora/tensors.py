"""Reading safetensors into numpy, bfloat16 included, which numpy has no type for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from tensorguard.errors import MissingWeightsError, UnsupportedAdapterError

MAX_ADAPTER_BYTES = 8 * 1024**3


def read_float_tensors(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """All tensors of a safetensors file as float32 (exact for float32, float16 and bfloat16).

    Raises MissingWeightsError when the file cannot be read and UnsupportedAdapterError when it is malformed,
    holds another type, or a number that is not finite.
    """
    try:
        if path.stat().st_size > MAX_ADAPTER_BYTES:
            raise UnsupportedAdapterError(f"{path} is larger than {MAX_ADAPTER_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise MissingWeightsError(
            f"cannot read {path} ({error.strerror}): save the adapter with PEFT's save_pretrained "
            "(safetensors; pickled adapter_model.bin files are not opened)"
        ) from None
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise UnsupportedAdapterError(f"{path} is not a safetensors file: {error}") from None
    return {name: _to_float32(name, entry) for name, entry in entries}


def _to_float32(name: str, entry: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    raw, kind = entry["data"], entry["dtype"]
    shape: list[int] = entry["shape"]
    if kind == "F32":
        values = np.frombuffer(raw, dtype="<f4")
    elif kind == "F16":
        values = np.frombuffer(raw, dtype="<f2").astype(np.float32)
    elif kind == "BF16":
        # The upper half of a float32.
        values = (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        raise UnsupportedAdapterError(f"{name} has type {kind}; float32, float16 and bfloat16 are supported")
    if not np.isfinite(values).all():
        raise UnsupportedAdapterError(f"{name} holds NaN or infinite values")
    return values.reshape(shape)
