"""The engine's options as vLLM gets them, up to the configuration that vLLM makes of them; nothing is started."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor import ray_utils
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from tensorguard.backends.vllm.compiled import split_at_hooks
from tensorguard.backends.vllm.config import WorkerSettings
from tensorguard.backends.vllm.core import EngineCore, engine_arguments
from tensorguard.backends.vllm.executor import SleepingExecutor
from tensorguard.backends.vllm.options import EngineOptions
from tensorguard.errors import ConfigurationError, NotFoundError
from tests.support.tiny_llama import write_tiny_llama

PASSED_ON = {
    "dtype": "float32",
    "quantization": "fp8",
    "max_model_len": 256,
    "gpu_memory_utilization": 0.5,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 512,
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,
    "seed": 7,
    "enforce_eager": False,
}


class NotStartedError(Exception):
    """vLLM accepted the configuration."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[VllmConfig]]:
    """What vLLM would start with."""
    made: list[VllmConfig] = []

    def from_engine_args(arguments: AsyncEngineArgs) -> None:
        made.append(arguments.create_engine_config())
        raise NotStartedError

    monkeypatch.setattr(AsyncLLM, "from_engine_args", from_engine_args)
    with mock.patch.dict(os.environ):  # the engine sets vLLM's variables
        yield made


async def start(model: Path, **options: Any) -> None:
    with pytest.raises(Exception, match="vLLM did not start") as caught:
        await EngineCore.start(EngineOptions(model=str(model), served_model_name="base", **options))
    assert isinstance(caught.value.__cause__, NotStartedError)


def with_another_vocabulary(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    described = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "vocab_size": 999}))
    return folder


def test_options_keep_their_names(model: Path) -> None:
    arguments = engine_arguments(EngineOptions(model=str(model), **PASSED_ON), model)
    assert {name: arguments[name] for name in PASSED_ON} == PASSED_ON
    assert arguments["async_scheduling"] is False
    assert set(arguments) <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def test_what_is_not_given_is_vllms_choice(model: Path) -> None:
    arguments = engine_arguments(EngineOptions(model=str(model)), model)
    assert not {"max_num_seqs", "enable_prefix_caching", "quantization", "speculative_config"} & set(arguments)


async def test_modes_become_vllms_configuration(model: Path, configured: list[VllmConfig]) -> None:
    await start(model, enforce_eager=False, max_num_batched_tokens=64, enable_prefix_caching=False)
    (config,) = configured
    assert config.scheduler_config.max_num_batched_tokens == 64
    assert not config.cache_config.enable_prefix_caching
    assert not config.scheduler_config.async_scheduling
    assert isinstance(config.additional_config, WorkerSettings)
    assert config.compilation_config.mode != CompilationMode.NONE
    assert config.compilation_config.cudagraph_mode in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE)
    split_at_hooks(config.compilation_config)


async def test_all_ranks_are_processes_of_this_machine(
    model: Path, configured: list[VllmConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_utils, "ray_is_available", lambda: True)
    await start(model, tensor_parallel_size=2)
    parallel = configured[0].parallel_config
    assert (parallel.tensor_parallel_size, parallel.world_size) == (2, 2)
    assert issubclass(Executor.get_class(configured[0]), MultiprocExecutor)


async def test_the_engine_sleeps_while_a_worker_computes(model: Path, configured: list[VllmConfig]) -> None:
    await start(model)
    assert Executor.get_class(configured[0]) is SleepingExecutor


@pytest.mark.parametrize(("ranks", "executor"), [(1, None), (2, "mp")])
def test_with_a_gpu_the_executor_is_vllms_own(
    model: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, executor: str | None
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments = engine_arguments(EngineOptions(model=str(model), tensor_parallel_size=ranks), model)
    assert arguments.get("distributed_executor_backend") == executor


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
async def test_speculation_becomes_vllms_configuration(model: Path, configured: list[VllmConfig], method: str) -> None:
    options = {"prompt_lookup_max": 4, "prompt_lookup_min": 2} if method == "ngram" else {"speculative_model": model}
    await start(model, speculative_method=method, num_speculative_tokens=3, **{k: str(v) for k, v in options.items()})
    speculative = configured[0].speculative_config
    assert speculative is not None
    assert (speculative.method, speculative.num_speculative_tokens) == (method, 3)
    if method == "ngram":
        assert (speculative.prompt_lookup_max, speculative.prompt_lookup_min) == (4, 2)
    else:
        assert speculative.model == str(model)


async def test_what_vllm_refuses_is_an_error_of_the_configuration(
    model: Path, configured: list[VllmConfig], tmp_path: Path
) -> None:
    other = with_another_vocabulary(model, tmp_path / "other")
    for options in (
        {"quantization": "no-such-method"},
        {"speculative_model": str(other), "num_speculative_tokens": 2},
        {"max_model_len": 1 << 20},
    ):
        with pytest.raises(ConfigurationError, match="vLLM refuses"):
            await EngineCore.start(EngineOptions(model=str(model), served_model_name="base", **options))
    assert not configured
    with pytest.raises(NotFoundError, match="no-draft"):
        await EngineCore.start(
            EngineOptions(model=str(model), speculative_model=str(tmp_path / "no-draft"), num_speculative_tokens=2)
        )
