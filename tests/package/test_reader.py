"""Opening packages: the right key and bytes open, and nothing else does."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from tensorguard.crypto import canonical
from tensorguard.crypto.aead import open_part, seal_part
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import PackageError, PackageKeyError, PackageTamperedError, PrivacyBoundError
from tensorguard.lora.adapter import LoraAdapter
from tensorguard.lora.groups import ERROR_BOUND
from tensorguard.package.envelope import SIGNATURES_BYTES
from tensorguard.package.inspection import read_unverified
from tensorguard.package.manifest import PAYLOAD_TYPE, parse_manifest
from tensorguard.package.parts import context_of, decode_basis
from tensorguard.package.reader import open_manifest, read_adapter, verify_parts
from tests.package.conftest import Packed


def open_all(path: Path, packed: Packed) -> None:
    """Everything a coprocessor does with a file."""
    read_adapter(path, open_manifest(path, packed.keys.public), packed.content_key)


def repack(packed: Packed, path: Path, changes: dict[str, Any]) -> Path:
    """A package with a changed manifest, correctly signed: what only a malicious or mistaken packer makes."""
    document = packed.verified.manifest.model_dump(mode="json")
    for name, value in changes.items():
        target: Any = document
        *parents, last = (int(step) if step.isdigit() else step for step in name.split("."))
        for step in parents:
            target = target[step]
        target[last] = canonical.encode_float(value) if isinstance(value, float) else value
    data = canonical.dumps(document)
    signature = packed.keys.sign(PAYLOAD_TYPE, data)
    header = struct.pack("<4sHHII", b"TSSP", 1, 0, len(data), SIGNATURES_BYTES)
    signatures = bytes.fromhex(packed.keys.public.key_id) + signature.ed25519 + signature.mldsa65
    parts = packed.path.read_bytes()[len(packed.verified.envelope) :]
    path.write_bytes(header + data + signatures + parts)
    return path


def test_what_was_packed_comes_out(packed: Packed) -> None:
    verified = open_manifest(packed.path, packed.keys.public)
    contents = read_adapter(packed.path, verified, packed.content_key)
    basis = decode_basis(verified.manifest, contents.u)
    adapter = LoraAdapter.load(packed.adapter)
    assert len(contents.groups) == 4
    for group in contents.groups:
        for info in group.info.projections:
            rows = group.integers[info.row_offset : info.row_offset + info.rank] * 2.0**-info.scale_exponent
            module = adapter.modules[group.info.layer, info.name]
            expected = module.scaling * module.B.astype(np.float64) @ module.A.astype(np.float64)
            delta = basis[group.info.layer, info.name].astype(np.float64) @ rows
            limit = ERROR_BOUND * np.linalg.norm(expected) / np.sqrt(group.info.d_in)
            assert np.linalg.norm(delta - expected, 2) <= limit
    assert verified == packed.verified


def test_a_list_of_trusted_signers(packed: Packed) -> None:
    other = SigningKeys.generate().public
    assert open_manifest(packed.path, [other, packed.keys.public]).signer == packed.keys.public.key_id
    with pytest.raises(PackageError, match="not trusted here"):
        open_manifest(packed.path, other)
    with pytest.raises(PackageError, match="trusted: none"):
        open_manifest(packed.path, [])


@pytest.mark.parametrize("key", [bytes(32), b"\xff" * 32])
def test_another_content_key(packed: Packed, key: bytes) -> None:
    with pytest.raises(PackageKeyError, match="not the content key"):
        read_adapter(packed.path, packed.verified, key)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_refused(packed: Packed, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(packed.path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "changed.tssp"
    path.write_bytes(content)
    with pytest.raises(PackageError):
        open_all(path, packed)


def test_every_region_is_protected(packed: Packed, tmp_path: Path) -> None:
    content = packed.path.read_bytes()
    envelope = len(packed.verified.envelope)
    weights, basis = (part.size for part in packed.verified.manifest.parts)
    signatures = envelope - SIGNATURES_BYTES
    regions = {
        "header": range(16),
        "manifest": range(16, signatures, 97),
        "signer": range(signatures, signatures + 32, 5),
        "ed25519": range(signatures + 32, signatures + 96),
        "ml-dsa-65": range(signatures + 96, envelope, 61),
        "weights": range(envelope, envelope + weights, 131),
        "basis": range(envelope + weights, envelope + weights + basis, 131),
        "end": range(len(content) - 2, len(content)),
    }
    path = tmp_path / "changed.tssp"
    for name, region in regions.items():
        for position in region:
            changed = bytearray(content)
            changed[position] ^= 1
            path.write_bytes(changed)
            with pytest.raises(PackageError):
                open_all(path, packed)
                pytest.fail(f"byte {position} ({name}) may be changed")


def test_part_hashes_alone_find_changes(packed: Packed, tmp_path: Path) -> None:
    verify_parts(packed.path, packed.verified)
    content = bytearray(packed.path.read_bytes())
    content[-1] ^= 1
    path = tmp_path / "changed.tssp"
    path.write_bytes(content)
    with pytest.raises(PackageTamperedError, match="basis was changed"):
        verify_parts(path, open_manifest(path, packed.keys.public))


def test_truncated_and_extended_files(packed: Packed, tmp_path: Path) -> None:
    content = packed.path.read_bytes()
    path = tmp_path / "changed.tssp"
    for length in (
        0,
        3,
        15,
        16,
        100,
        len(packed.verified.envelope) - 1,
        len(packed.verified.envelope),
        len(content) - 1,
    ):
        path.write_bytes(content[:length])
        for read in (lambda: open_manifest(path, packed.keys.public), lambda: read_unverified(path)):
            with pytest.raises(PackageError):
                read()
    path.write_bytes(content + b"\0")
    with pytest.raises(PackageTamperedError, match="bytes"):
        open_manifest(path, packed.keys.public)
    with pytest.raises(PackageError, match="cannot read"):
        open_manifest(tmp_path / "absent.tssp", packed.keys.public)


def test_lengths_are_bounded_before_reading(packed: Packed, tmp_path: Path) -> None:
    path = tmp_path / "huge.tssp"
    path.write_bytes(b"TSSP\x01\x00\x00\x00\xff\xff\xff\xff\x4d\x0d\x00\x00")
    with pytest.raises(PackageError, match="impossible lengths"):
        open_manifest(path, packed.keys.public)


@pytest.mark.parametrize(("offset", "value"), [(4, 2), (5, 1), (6, 1)])
def test_other_versions_and_flags(packed: Packed, tmp_path: Path, offset: int, value: int) -> None:
    content = bytearray(packed.path.read_bytes())
    content[offset] = value
    path = tmp_path / "changed.tssp"
    path.write_bytes(content)
    with pytest.raises(PackageError, match="is not known"):
        open_manifest(path, packed.keys.public)


def test_a_file_exchanged_after_verification(packed: Packed, tmp_path: Path) -> None:
    path = repack(packed, tmp_path / "other.tssp", {"created": packed.verified.manifest.created - 1})
    with pytest.raises(PackageTamperedError, match="whose manifest was verified"):
        read_adapter(path, packed.verified, packed.content_key)


def test_parts_of_another_package_do_not_open(packed: Packed, tmp_path: Path) -> None:
    # The packer's own key, but the parts were sealed for sequence 1.
    path = repack(packed, tmp_path / "moved.tssp", {"sequence": 7})
    with pytest.raises(PackageTamperedError, match="weights does not open"):
        open_all(path, packed)


def test_expired_packages(packed: Packed) -> None:
    manifest = packed.verified.manifest
    read_adapter(packed.path, packed.verified, packed.content_key, now=manifest.expires - 1)
    with pytest.raises(PackageError, match="expired"):
        read_adapter(packed.path, packed.verified, packed.content_key, now=manifest.expires)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moai.rotations": 1}, "moai.rotations"),
        ({"moai.evaluation_keys": 1}, "moai.evaluation_keys"),
        ({"moai.mode": "both"}, "moai.mode"),
        ({"moai.mode": "full"}, "in full mode the rank of q_proj is its d_out"),
        ({"moai.groups.0.projections.1.rank": 129}, "in factored mode .* at most rank 128"),
        ({"moai.groups.0.projections.1.rank": 1 << 16}, "at most 65536 rows"),
        ({"moai.parameter_set": "n8192"}, "unknown parameter set"),
        ({"moai.groups.0.plans": ("t16.c64.r16",)}, "exceeds the ring degree 8192"),
        ({"moai.groups.0.plans": ("t16.c64.r8",)}, "exceeds the ring degree 4096"),
        ({"moai.groups.0.plans": ("t16.c1.r16",)}, "128 outputs"),
        ({"moai.groups.0.plans": ()}, "plans"),
        ({"moai.groups.0.plans": ("t1.c64.r8",) * 2}, "a plan occurs twice"),
        ({"moai.groups.0.norm_bound": 1e9}, "norm_bound"),
        ({"moai.groups.0.error_bound": 0.5}, "error_bound"),
        ({"moai.groups.0.group": "o"}, "cannot hold"),
        ({"moai.groups.1.layer": 1}, "in order of layer"),
        ({"moai.groups.0.projections.1.row_offset": 5}, "must begin at row 4"),
        ({"parts.1.offset": 1}, "must begin at offset"),
        ({"parts.1.role": "weights"}, "a weights part and then, unless its mode is full"),
        ({"expires": 1}, "expires before"),
        ({"extra": 1}, "extra"),
        ({"version": 2}, "version"),
        ({"tenant": "../x"}, "tenant"),
    ],
)
def test_signed_manifests_that_break_the_contract(
    packed: Packed, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PackageError, match=message):
        open_manifest(repack(packed, tmp_path / "x.tssp", changes), packed.keys.public)


def test_privacy_bounds(packed: Packed, tmp_path: Path) -> None:
    claimed = packed.verified.manifest.moai.total_variation_log2
    assert claimed < -30
    with pytest.raises(PrivacyBoundError, match="above the limit"):
        read_adapter(packed.path, packed.verified, packed.content_key, privacy_bound_log2=claimed - 1)
    # A packer that claims less than the weights give is found out when they are decrypted.
    path = repack(packed, tmp_path / "a.tssp", {"moai.total_variation_log2": claimed - 1})
    verified = open_manifest(path, packed.keys.public)
    with pytest.raises(PrivacyBoundError):
        read_adapter(path, verified, packed.content_key)
    # One that claims more than its own limit, already when the manifest is opened.
    path = repack(packed, tmp_path / "b.tssp", {"moai.total_variation_log2": -10})
    with pytest.raises(PrivacyBoundError):
        open_manifest(path, packed.keys.public)
    path = repack(packed, tmp_path / "c.tssp", {"moai.total_variation_log2": -10, "moai.privacy_bound_log2": -5})
    with pytest.raises(PrivacyBoundError):
        open_manifest(path, packed.keys.public)
    # A larger token budget than the claimed distance is for.
    path = repack(packed, tmp_path / "d.tssp", {"token_budget": 10**9})
    with pytest.raises(PrivacyBoundError):
        read_adapter(path, open_manifest(path, packed.keys.public), packed.content_key)


def resealed(packed: Packed, path: Path, role: str, plaintext: bytes) -> Path:
    """A package whose part was sealed with the right key, but holds something else."""
    manifest = packed.verified.manifest
    data = packed.path.read_bytes()[len(packed.verified.envelope) :]
    pieces = {part.role: data[part.offset : part.offset + part.size] for part in manifest.parts}
    part = next(part for part in manifest.parts if part.role == role)
    pieces[role] = seal_part(packed.content_key, context_of(manifest, part), plaintext)
    document: dict[str, Any] = {}
    for number, name in enumerate(("weights", "basis")):
        document[f"parts.{number}.size"] = len(pieces[name])
        document[f"parts.{number}.sha256"] = hashlib.sha256(pieces[name]).hexdigest()
    document["parts.1.offset"] = len(pieces["weights"])
    changed = repack(packed, path, document).read_bytes()
    changed = changed[: len(changed) - len(data)]
    path.write_bytes(changed + pieces["weights"] + pieces["basis"])
    return path


def test_parts_that_are_not_what_the_manifest_says(packed: Packed, tmp_path: Path) -> None:
    manifest = packed.verified.manifest
    data = packed.path.read_bytes()[len(packed.verified.envelope) :]
    weights, basis = (
        load(open_part(packed.content_key, context_of(manifest, part), data[part.offset : part.offset + part.size]))
        for part in manifest.parts
    )
    first, u = "layer.0.qkv", "layer.0.q_proj"
    assert weights[first].dtype == np.int16
    bad_weights = [
        b"junk",
        save({name: value for name, value in weights.items() if name != first}),
        save(weights | {"layer.9.qkv": weights[first]}),
        save(weights | {first: weights[first].astype(np.float32)}),
        save(weights | {first: np.ascontiguousarray(weights[first][:, :-1])}),
        save(weights | {first: weights[first].astype(np.int32) * 1000}),  # could wrap around
    ]
    for content in bad_weights:
        path = resealed(packed, tmp_path / "w.tssp", "weights", content)
        with pytest.raises(PackageError):
            open_all(path, packed)
    nan = basis[u].copy()
    nan[0, 0] = np.nan
    for content in (b"junk", save(basis | {u: nan}), save(basis | {u: basis[u].astype(np.float64)})):
        path = resealed(packed, tmp_path / "u.tssp", "basis", content)
        with pytest.raises(PackageError):
            open_all(path, packed)
    open_all(resealed(packed, tmp_path / "w.tssp", "weights", save(weights)), packed)  # the test itself is right


def test_one_projection_over_its_own_bound_is_refused(packed: Packed, tmp_path: Path) -> None:
    # Every row within the group's bound, but the projection's Frobenius norm over it.
    contents = read_adapter(packed.path, packed.verified, packed.content_key)
    integers = {group.info.tensor_name: group.integers.copy() for group in contents.groups}
    bound = contents.groups[0].info.norm_bound
    integers["layer.0.qkv"][:4] = int(bound / np.sqrt(48) * 0.9)
    path = resealed(packed, tmp_path / "w.tssp", "weights", save(integers))
    with pytest.raises(PackageError, match="q_proj: weights exceed"):
        open_all(path, packed)


def test_unverified_reading_shows_the_same_manifest(packed: Packed) -> None:
    unverified = read_unverified(packed.path)
    assert unverified.manifest == packed.verified.manifest
    assert unverified.digest == packed.verified.digest
    assert parse_manifest(packed.verified.manifest.to_bytes()) == packed.verified.manifest
