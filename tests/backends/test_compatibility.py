"""A vLLM that the hooks were not made for is refused by name before a model is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tensorguard.backends.vllm import compatibility
from tensorguard.backends.vllm.compatibility import check_vllm
from tensorguard.backends.vllm.core import EngineCore
from tensorguard.backends.vllm.options import EngineOptions
from tensorguard.errors import ConfigurationError


def test_the_installed_release_is_supported() -> None:
    check_vllm()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.32.2rc1"])
def test_releases_of_the_range_are_supported(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    check_vllm()


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "dev", "0.1.dev1+gabc"])
def test_another_release_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(ConfigurationError, match=r"below 0\.33; install") as caught:
        check_vllm()
    assert f"vLLM {version} is not supported" in caught.value.message
    assert "tensafe[inference-cpu]" in caught.value.message


@pytest.mark.parametrize(
    ("owner", "name"), [(GPUModelRunner, "_model_forward"), (KVCacheManager, "evict_blocks"), (vllm, "SamplingParams")]
)
def test_a_missing_part_is_named(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    module = sys.modules["vllm.sampling_params"] if owner is vllm else owner
    monkeypatch.delattr(module, name)
    with pytest.raises(ConfigurationError, match=rf"{name} missing; install"):
        check_vllm()


def test_a_missing_field_of_a_dataclass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(InputBatch.__annotations__, "query_start_loc_np")
    with pytest.raises(ConfigurationError, match=r"InputBatch\.query_start_loc_np missing"):
        check_vllm()


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.input_batch", None)
    with pytest.raises(ConfigurationError, match=r"vllm\.v1\.worker\.gpu\.input_batch\.InputBatch missing"):
        check_vllm()


def test_no_vllm_at_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigurationError, match="vLLM is not installed; install"):
        check_vllm()


async def test_the_engine_refuses_before_it_reads_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("no model at all")
    monkeypatch.setattr(compatibility, "NEXT_VERSION", (0, 32))
    with pytest.raises(ConfigurationError, match="is not supported"):
        await EngineCore.start(EngineOptions(model=str(tmp_path)))


@pytest.mark.parametrize("module", ["tensorguard.backends.vllm", "services.inference.__main__"])
def test_vllms_processes_load_no_numba_with_the_configuration(module: str) -> None:
    """A process of vLLM imports the program's main module and what the configuration is made of. vLLM then looks into
    everything that is loaded, and stumbles over an object of llvmlite."""
    root = Path(__file__).resolve().parents[2]
    code = f"import {module}, sys; print('llvmlite' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout.splitlines()[-1] == "False"
