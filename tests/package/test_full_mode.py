"""Packages in full mode: s*B*A sealed whole, and nothing for the inference host but deltas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorguard.ckks import get_parameter_set, plan
from tensorguard.errors import InvalidInputError, PackageError
from tensorguard.lora import LoraAdapter
from tensorguard.package import manifest as manifest_module
from tensorguard.package.contract import group_plans
from tensorguard.package.envelope import VerifiedManifest
from tensorguard.package.manifest import Group
from tensorguard.package.parts import decode_basis
from tensorguard.package.reader import open_manifest, read_adapter
from tensorguard.package.writer import pack_adapter
from tensorguard.session import frames
from tensorguard.store.state import AttestorState
from tests.package.conftest import Packed


@pytest.fixture(scope="module")
def full(packed: Packed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VerifiedManifest, bytes]:
    folder = tmp_path_factory.mktemp("full")
    registry = AttestorState.open(folder / "attestor").packages
    arguments = packed.arguments(sequence=1, key_registrar=registry.register, mode="full")
    verified = pack_adapter(packed.adapter, folder / "x.tssp", **arguments)
    key = registry.lookup("acme", "law-style", 1, verified.digest).content_key
    return folder / "x.tssp", verified, key


def test_weights_are_the_whole_product(packed: Packed, full: tuple[Path, VerifiedManifest, bytes]) -> None:
    path, verified, key = full
    contents = read_adapter(path, open_manifest(path, packed.keys.public), key)
    modules = LoraAdapter.load(packed.adapter).modules
    assert verified.manifest.moai.mode == "full"
    for group in contents.groups:
        assert group.integers.shape == (sum(p.d_out for p in group.info.projections), group.info.d_in)
        for p in group.info.projections:
            module = modules[group.info.layer, p.name]
            expected = module.scaling * module.B.astype(np.float64) @ module.A.astype(np.float64)
            found = group.integers[p.row_offset : p.row_offset + p.rank] * 2.0**-p.scale_exponent
            relative = np.linalg.norm(found - expected, 2) * np.sqrt(group.info.d_in) / np.linalg.norm(expected)
            assert p.rank == p.d_out and relative <= 2.0**-9


def test_there_is_no_basis_in_it(full: tuple[Path, VerifiedManifest, bytes]) -> None:
    path, verified, key = full
    manifest = verified.manifest
    assert [part.role for part in manifest.parts] == ["weights"]
    contents = read_adapter(path, verified, key)
    assert contents.u == b"" and decode_basis(manifest, contents.u) == {}
    with pytest.raises(PackageError, match="full mode has no basis"):
        decode_basis(manifest, b"x")


def test_scale_is_that_of_rank_sixteen(full: tuple[Path, VerifiedManifest, bytes]) -> None:
    manifest = full[1].manifest
    parameters = get_parameter_set(manifest.moai.parameter_set)
    for group in manifest.moai.groups:
        assert group.norm_bound == parameters.norm_bound(group.d_in, 16) and group.rows > 16


def test_rows_are_limited_in_one_place() -> None:
    assert manifest_module.MAX_ROWS == plan.MAX_ROWS == frames.MAX_ROWS


def test_memory_limits_leave_plans_out(packed: Packed, tmp_path: Path) -> None:
    registry = AttestorState.open(tmp_path / "attestor").packages

    def plans(name: str, memory_limit: int | None) -> tuple[int, int]:
        arguments = packed.arguments(sequence=len(name), key_registrar=registry.register, memory_limit=memory_limit)
        manifest = pack_adapter(packed.adapter, tmp_path / name, **arguments).manifest
        parameters = get_parameter_set(manifest.moai.parameter_set)
        used = [
            member.weight_bytes(parameters, group.d_in, group.rows)
            for group in manifest.moai.groups
            for member in group_plans(group, parameters)
        ]
        return len(used), sum(used)

    many, taken = plans("a", None)
    fewer, less = plans("bb", taken // 2)
    assert fewer < many and less <= taken // 2
    with pytest.raises(InvalidInputError, match="allow the adapter at least"):
        plans("ccc", 1000)
    assert not (tmp_path / "ccc").exists()


def test_plans_whose_calls_fit_no_frame_are_refused() -> None:
    projection = {"name": "o_proj", "rank": 4, "d_out": 8, "row_offset": 0, "scale_exponent": 0}
    group = Group.model_validate(
        {
            "layer": 0,
            "group": "o",
            "d_in": 1 << 17,
            "projections": (projection,),
            "norm_bound": 1.0,
            "error_bound": 1.0,
            "plans": ("t1.c1024.r4", "t1.c128.r4"),
        }
    )
    parameters = get_parameter_set("n4096-q90-w12")
    with pytest.raises(PackageError, match=r"t1\.c128\.r4 does not fit a frame"):
        group_plans(group, parameters)
    kept = group.model_copy(update={"plans": ("t1.c1024.r4",)})
    assert [member.identifier for member in group_plans(kept, parameters)] == ["t1.c1024.r4"]
