"""Whether the installed vLLM has what the hooks build on, told before a model is loaded.

The hooks reach into parts of vLLM that it promises to nobody. The version range says which releases they were run
on; `PARTS` names, class by class, what they use, so that a release from elsewhere (a fork, a patched build) is refused
for what it lacks instead of failing in the middle of a request.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from tensorguard.errors import ConfigurationError

FIRST_VERSION = (0, 32)
"""The oldest release the hooks were run on."""
NEXT_VERSION = (0, 33)
"""The first one they were not."""

INSTALL = 'install "tensafe[inference-gpu]", or "tensafe[inference-cpu]" for a machine without a GPU'


@dataclass(frozen=True, slots=True)
class Part:
    """A class of vLLM, or a module for which `name` is empty, and what must be in it."""

    module: str
    name: str
    attributes: tuple[str, ...]


PARTS = (
    # hooks.py, install.py
    Part(
        "vllm.model_executor.layers.linear",
        "LinearMethodBase",
        ("create_weights", "apply", "process_weights_after_loading"),
    ),
    Part(
        "vllm.model_executor.layers.linear",
        "",
        ("LinearBase", "QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"),
    ),
    # worker.py
    Part("vllm.v1.worker.gpu_worker", "Worker", ("load_model", "sample_tokens", "get_model", "shutdown")),
    Part("vllm.v1.outputs", "ModelRunnerOutput", ("req_ids", "sampled_token_ids")),
    Part("vllm.v1.outputs", "AsyncModelRunnerOutput", ("get_output",)),
    # runners.py
    Part("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", ("_model_forward",)),
    Part("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", ("add_requests", "prepare_inputs", "execute_model")),
    Part("vllm.v1.worker.gpu.input_batch", "InputBatch", ("req_ids", "num_reqs", "query_start_loc_np")),
    Part("vllm.v1.core.sched.output", "NewRequestData", ("req_id", "sampling_params")),
    Part(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        ("scheduled_new_reqs", "finished_req_ids", "preempted_req_ids"),
    ),
    Part("vllm.sampling_params", "SamplingParams", ("extra_args", "clone")),
    # failures.py
    Part("vllm.v1.core.sched.scheduler", "Scheduler", ("schedule", "update_from_output", "finish_requests")),
    Part("vllm.exceptions", "", ("GenerationError", "RetryableRequestError")),
    Part("vllm.v1.core.kv_cache_manager", "KVCacheManager", ("get_block_ids", "evict_blocks")),
    Part("vllm.v1.engine", "FinishReason", ("ERROR",)),
    Part("vllm.v1.request", "RequestStatus", ("FINISHED_ERROR",)),
    # compiled.py
    Part("vllm.utils.torch_utils", "", ("direct_register_custom_op",)),
    Part("vllm.forward_context", "ForwardContext", ("no_compile_layers",)),
    Part(
        "vllm.config",
        "CompilationConfig",
        ("mode", "splitting_ops", "static_forward_context", "cudagraph_mode", "use_inductor_graph_partition"),
    ),
    # executor.py
    Part("vllm.v1.executor.multiproc_executor", "MultiprocExecutor", ("_init_executor",)),
    Part("vllm.distributed.device_communicators.shm_broadcast", "SpinCondition", ("wait",)),
    # parallel.py
    Part("vllm.distributed.parallel_state", "", ("get_tp_group",)),
)


def check_vllm() -> None:
    """Raise ConfigurationError, with what to install, unless the installed vLLM is one the hooks support."""
    try:
        version = str(importlib.import_module("vllm").__version__)
    except ImportError:
        raise ConfigurationError(f"vLLM is not installed; {INSTALL}") from None
    if not FIRST_VERSION <= _release(version) < NEXT_VERSION:
        raise ConfigurationError(
            f"vLLM {version} is not supported: private adapters need {_text(FIRST_VERSION)} or later, below "
            f"{_text(NEXT_VERSION)}; {INSTALL}"
        )
    if missing := [name for part in PARTS for name in _missing(part)]:
        raise ConfigurationError(
            f"this vLLM {version} is not the published release: {', '.join(missing)} missing; {INSTALL}"
        )


def _missing(part: Part) -> Iterator[str]:
    path = ".".join(filter(None, (part.module, part.name)))
    try:
        owner = importlib.import_module(part.module)
        if part.name:
            owner = getattr(owner, part.name)
    except (ImportError, AttributeError):
        yield path
        return
    # Fields of a dataclass without a default are in its annotations only.
    fields = {name for base in getattr(owner, "__mro__", ()) for name in vars(base).get("__annotations__", ())}
    yield from (f"{path}.{name}" for name in part.attributes if not hasattr(owner, name) and name not in fields)


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number; (0,) of what is no version, such as a build from a working tree."""
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if len(parts) == 2 and all(map(str.isdecimal, parts)) else (0,)


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
