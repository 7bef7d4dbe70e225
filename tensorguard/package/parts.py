"""The plaintext of a package's parts, both safetensors.

weights: for each group "layer.<n>.<group>", its stacked integers [rows, d_in] in one integer type for the
package. basis, in factored mode only: for each projection "layer.<n>.<projection>", U as float32 [d_out, rank].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from tensorguard.crypto import canonical
from tensorguard.errors import PackageError
from tensorguard.lora.adapter import Float32Array, ModuleKey
from tensorguard.lora.groups import Int32Array, RoundedGroup
from tensorguard.package.manifest import Manifest, Part

_INTEGER_TYPES = {"I8": "<i1", "I16": "<i2", "I32": "<i4"}


def part_context(tenant: str, package_id: str, sequence: int, key_id: str, name: str, role: str) -> bytes:
    """What a part's key is derived for: moved to another package, sequence or role, it does not open."""
    return canonical.dumps(
        {
            "format": "tssp/v1/part",
            "tenant": tenant,
            "package_id": package_id,
            "sequence": sequence,
            "key_id": key_id,
            "name": name,
            "role": role,
        }
    )


def context_of(manifest: Manifest, part: Part) -> bytes:
    """`part_context` with the values of a manifest."""
    return part_context(manifest.tenant, manifest.package_id, manifest.sequence, manifest.key_id, part.name, part.role)


def encode_weights(groups: Sequence[RoundedGroup]) -> bytes:
    """The weights part. The smallest integer type that holds every value is used for all of them."""
    largest = max(int(np.abs(group.integers).max()) for group in groups)
    kind = next(kind for kind in (np.int8, np.int16, np.int32) if largest <= np.iinfo(kind).max)
    data: bytes = save({f"layer.{group.layer}.{group.group}": group.integers.astype(kind) for group in groups})
    return data


def encode_basis(groups: Sequence[RoundedGroup]) -> bytes:
    """The basis part."""
    data: bytes = save(
        {f"layer.{group.layer}.{name}": np.ascontiguousarray(u) for group in groups for name, u in group.u.items()}
    )
    return data


def decode_weights(manifest: Manifest, data: bytes) -> tuple[Int32Array, ...]:
    """Integers of each group in the manifest's order, int32 [rows, d_in].

    Raises PackageError when names, types or shapes are not exactly those the manifest announces.
    """
    tensors = _deserialise(data, {group.tensor_name for group in manifest.moai.groups})
    result = []
    for group in manifest.moai.groups:
        entry = tensors[group.tensor_name]
        if entry["dtype"] not in _INTEGER_TYPES or entry["shape"] != [group.rows, group.d_in]:
            raise PackageError(f"{group.tensor_name} does not have the type and shape the manifest announces")
        values = np.frombuffer(entry["data"], dtype=_INTEGER_TYPES[entry["dtype"]])
        result.append(values.astype(np.int32).reshape(group.rows, group.d_in))
    return tuple(result)


def decode_basis(manifest: Manifest, data: bytes) -> Mapping[ModuleKey, Float32Array]:
    """U of each projection, float32 [d_out, rank], by (layer, projection). In full mode both sides are empty.

    Raises PackageError when names, types or shapes are not exactly those the manifest announces, or a value
    is not finite.
    """
    if manifest.moai.mode == "full":
        if data:
            raise PackageError("a package in full mode has no basis, yet one was given")
        return {}
    expected = {
        f"layer.{group.layer}.{projection.name}": ((group.layer, projection.name), projection)
        for group in manifest.moai.groups
        for projection in group.projections
    }
    tensors = _deserialise(data, set(expected))
    basis: dict[ModuleKey, Float32Array] = {}
    for name, (key, projection) in expected.items():
        entry = tensors[name]
        if entry["dtype"] != "F32" or entry["shape"] != [projection.d_out, projection.rank]:
            raise PackageError(f"{name} does not have the type and shape the manifest announces")
        u = np.frombuffer(entry["data"], dtype="<f4").reshape(projection.d_out, projection.rank)
        if not np.isfinite(u).all():
            raise PackageError(f"{name} holds NaN or infinite values")
        basis[key] = u
    return basis


def _deserialise(data: bytes, names: set[str]) -> dict[str, dict[str, Any]]:
    try:
        tensors = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise PackageError(f"a part is not safetensors: {error}") from None
    if tensors.keys() != names:
        raise PackageError("a part does not hold exactly the tensors the manifest announces")
    return tensors
