"""Which base model a folder holds, as three hashes that two machines agree on.

A `.tssp` package names the base model its adapter was made for. What each hash binds:

`config_sha256`
    config.json without the fields that tell how it was written: `transformers_version`, `_name_or_path` and
    `_model_name_or_path`.
`tokenizer_sha256`
    tokenizer.json (or, where a model has none, tokenizer.model), the chat template, and the fields of
    tokenizer_config.json that change token ids or the rendering of a template.
`weight_index_sha256`
    the shard names and their mapping (model.safetensors.index.json), each shard's size, its complete
    safetensors header (names, types, shapes and offsets of all tensors), and 256 samples of 4 KiB spread
    evenly over its data.

Reading gigabytes at every start is not wanted, so the weights are *sampled*: another fine-tune of the same
architecture differs nearly everywhere and is told apart, but someone who changes single weights on purpose
is not detected. The hash answers "is this the model the adapter was trained on?"; it is not an integrity
seal.

No torch; hashes are SHA-256 over canonical JSON (sorted keys, no white space, UTF-8).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorguard.errors import ConfigurationError, InvalidInputError

CONFIG_FIELDS_IGNORED = frozenset({"transformers_version", "_name_or_path", "_model_name_or_path"})
TOKENIZER_FIELDS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
)

_MAX_JSON_BYTES = {"config.json": 4 << 20, "tokenizer_config.json": 16 << 20, "tokenizer.json": 256 << 20}
_MAX_INDEX_BYTES = 64 << 20
_MAX_TEMPLATE_BYTES = 4 << 20
_MAX_TOKENIZER_MODEL_BYTES = 256 << 20
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_MAX_SHARDS = 4096
_SAMPLES = 256
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class BaseModelIdentity:
    """A base model's name (for people) and hashes (for programs), lower-case hex SHA-256 each."""

    name: str
    config_sha256: str
    tokenizer_sha256: str
    weight_index_sha256: str

    def differences(self, other: BaseModelIdentity) -> tuple[str, ...]:
        """Which of "config", "tokenizer", "weights" differ. Names are labels and are not compared."""
        pairs = {
            "config": (self.config_sha256, other.config_sha256),
            "tokenizer": (self.tokenizer_sha256, other.tokenizer_sha256),
            "weights": (self.weight_index_sha256, other.weight_index_sha256),
        }
        return tuple(part for part, (mine, theirs) in pairs.items() if mine != theirs)


def base_model_identity(folder: Path | str) -> BaseModelIdentity:
    """Read the identity of the Hugging Face model in `folder` (a few megabytes are read, whatever its size).

    Raises ConfigurationError when the folder or one of its files is missing, InvalidInputError when a file is
    malformed or larger than its bound.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigurationError(f"{path} is not a folder; name a local Hugging Face model folder")
    config = _read_json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise InvalidInputError(f"{path / 'config.json'} has no model_type: not a Hugging Face model")
    return BaseModelIdentity(
        name=_folder_name(path),
        config_sha256=_hash({key: config[key] for key in config if key not in CONFIG_FIELDS_IGNORED}),
        tokenizer_sha256=_hash(_tokenizer_facts(path)),
        weight_index_sha256=_hash(_weight_facts(path)),
    )


def _folder_name(path: Path) -> str:
    """The folder's name, or "owner/model" for a snapshot in Hugging Face's cache layout."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return path.name


def _tokenizer_facts(path: Path) -> dict[str, Any]:
    config_path = path / "tokenizer_config.json"
    config = _read_json(config_path) if config_path.is_file() else {}
    template_path = path / "chat_template.jinja"
    if template_path.is_file():  # transformers prefers this file, too
        template: Any = _decode(template_path, _read_bounded(template_path, _MAX_TEMPLATE_BYTES))
    else:
        template = config.get("chat_template")
    facts: dict[str, Any] = {
        "chat_template": template,
        "settings": {field: config[field] for field in TOKENIZER_FIELDS if config.get(field) is not None},
    }
    if (path / "tokenizer.json").is_file():
        return facts | {"tokenizer": _read_json(path / "tokenizer.json")}
    if (path / "tokenizer.model").is_file():
        data = _read_bounded(path / "tokenizer.model", _MAX_TOKENIZER_MODEL_BYTES)
        return facts | {"tokenizer_model_sha256": hashlib.sha256(data).hexdigest()}
    raise ConfigurationError(f"{path} has neither tokenizer.json nor tokenizer.model; copy the tokenizer there")


def _weight_facts(path: Path) -> dict[str, Any]:
    index_path = path / "model.safetensors.index.json"
    if index_path.is_file():
        weight_map = _read_json(index_path, _MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidInputError(f"{index_path} has no weight_map")
        shards = sorted({_shard_name(index_path, name) for name in weight_map.values()})
    else:
        weight_map, shards = None, ["model.safetensors"]
    if len(shards) > _MAX_SHARDS:
        raise InvalidInputError(f"{index_path} names {len(shards)} shards, more than {_MAX_SHARDS}")
    missing = [name for name in shards if not (path / name).is_file()]
    if missing:
        others = f" and {len(missing) - 1} more shards" if len(missing) > 1 else ""
        raise ConfigurationError(f"{path} lacks {missing[0]}{others}; the weights must be there as safetensors")
    return {"weight_map": weight_map, "shards": {name: _shard_facts(path / name) for name in shards}}


def _shard_name(index_path: Path, name: Any) -> str:
    """A shard is a plain file name: an index must not lead out of its folder."""
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise InvalidInputError(f"{index_path} names an invalid shard {str(name)[:80]!r}")
    return name


def _shard_facts(path: Path) -> dict[str, Any]:
    """Size, header hash and hash of the samples of one safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= header_size <= min(_MAX_HEADER_BYTES, size - 8):
            raise InvalidInputError(f"{path} is not a safetensors file: its header length is impossible")
        header = stream.read(header_size)
        if header[:1] != b"{":
            raise InvalidInputError(f"{path} is not a safetensors file: its header is not JSON")
        samples = hashlib.sha256()
        start = 8 + header_size
        last = max(start, size - _SAMPLE_BYTES)
        # A short file is read whole (the samples touch or overlap); positions depend on sizes alone.
        for index in range(_SAMPLES):
            stream.seek(start + (last - start) * index // (_SAMPLES - 1))
            samples.update(stream.read(_SAMPLE_BYTES))
    return {
        "size": size,
        "header_sha256": hashlib.sha256(header).hexdigest(),
        "samples_sha256": samples.hexdigest(),
    }


def _read_json(path: Path, limit: int | None = None) -> dict[str, Any]:
    data = _read_bounded(path, _MAX_JSON_BYTES[path.name] if limit is None else limit)
    try:
        value = json.loads(_decode(path, data))
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidInputError(f"{path} is not a JSON object")
    return value


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except FileNotFoundError:
        raise ConfigurationError(f"{path.parent} lacks {path.name}; copy the complete model folder") from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise InvalidInputError(f"{path} is larger than {limit} bytes")
    return data


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInputError(f"{path} is not UTF-8 text") from None


def _hash(value: Mapping[str, Any]) -> str:
    """SHA-256 of `value` as canonical JSON. Floats are written as Python's shortest round-trip decimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
