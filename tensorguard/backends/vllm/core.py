"""Start vLLM's AsyncLLM with the hooks, and have adapters come and go in it.

`EngineCore` is what both `TenSafeAsyncEngine` and the inference service are built on. It needs running
attestors and coprocessors; it starts none.
"""

from __future__ import annotations

import asyncio
import atexit
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from tensorguard.backends.vllm.compatibility import check_vllm
from tensorguard.backends.vllm.config import (
    SESSION_DEFAULTS,
    AdapterConnection,
    WorkerSettings,
    resolve_model_path,
)
from tensorguard.backends.vllm.options import EngineOptions, check_engine_options
from tensorguard.errors import ConfigurationError, InternalError, UnavailableError

if TYPE_CHECKING:
    from tensorguard.backends.vllm.registry import OnDetached
    from tensorguard.backends.vllm.routing import ModelRoute, ServedAdapter

log = structlog.get_logger(__name__)

WORKER_CLASS = "tensorguard.backends.vllm.worker.HeLoraWorker"
SCHEDULER_CLASS = "tensorguard.backends.vllm.failures.FailClosedScheduler"
STATUS_SECONDS = 30.0
GIB = 1 << 30

# Set before vLLM is imported; what the environment already says wins.
ENVIRONMENT_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Standard output is the caller's: text of a script, JSON log lines of a service.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Idle threads sleep instead of spinning: on a small machine vLLM shares its cores with the coprocessor.
    "OMP_WAIT_POLICY": "PASSIVE",
    # The hooks know both runners, but V2 needs a GPU and has not been seen with them on one.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}

_END_SECONDS = 15.0
"""The engine process gives its workers up to nine seconds to end; killed before that, it leaves shared memory."""


class EngineCore:
    """A running vLLM engine and its adapters. Create it with `start` inside a running event loop."""

    def __init__(
        self, llm: Any, options: EngineOptions, model_path: Path, *, he_lora: bool, on_detached: OnDetached
    ) -> None:
        from tensorguard.backends.vllm.registry import AdapterRegistry

        self.llm = llm
        self.options = options
        self.model_path = model_path
        self.he_lora = he_lora
        self._registry = AdapterRegistry(self._call, options.base_name, on_detached)
        self._closed = False
        atexit.register(self.shutdown)

    @classmethod
    async def start(
        cls,
        options: EngineOptions,
        adapters: Sequence[AdapterConnection] = (),
        *,
        he_lora: bool = True,
        require_attestation: bool = True,
        simulated_root_key: Path | None = None,
        plaintext_network: bool = False,
        delta_timeout_seconds: float = 30.0,
        pool_bytes: int = SESSION_DEFAULTS.pool_bytes,
        shared_memory_bytes: int = SESSION_DEFAULTS.shared_memory_bytes,
        worker_class: str = WORKER_CLASS,
        on_detached: OnDetached | None = None,
    ) -> EngineCore:
        """Load the model, attach the adapters, and answer when both are done. Takes the time vLLM takes.

        `on_detached` is told of every release that was replaced or removed, once its last request has ended.
        Without `he_lora` vLLM runs as it comes, and no adapter can be attached. Raises the TenSafeError that kept an
        adapter from being attached (after shutting vLLM down), ConfigurationError for options that vLLM refuses,
        NotFoundError for a model that is not there, InternalError where vLLM itself does not start.
        """
        check_engine_options(options)
        names = [adapter.name for adapter in adapters]
        if len({*names, options.base_name}) != len(names) + 1:
            raise ConfigurationError(
                f"adapters need names of their own, other than the base model's {options.base_name!r}"
            )
        model_path = resolve_model_path(options.model)
        arguments = engine_arguments(options, model_path)
        if he_lora:
            settings = WorkerSettings(
                model_path=model_path,
                require_attestation=require_attestation,
                simulated_root_key=simulated_root_key,
                plaintext_network=plaintext_network,
                delta_timeout_seconds=delta_timeout_seconds,
                pool_bytes=pool_bytes,
                shared_memory_bytes=shared_memory_bytes,
            )
            if not options.enforce_eager:
                # Hooks run between graphs: one graph of a whole pass would leave them out.
                arguments["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
            arguments |= {
                "worker_cls": worker_class,
                "scheduler_cls": SCHEDULER_CLASS,
                "additional_config": settings,
            }
        for name, value in ENVIRONMENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        check_vllm()
        log.info("engine_starting", model=str(model_path), adapters=names)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except ValueError as error:
            raise ConfigurationError(f"vLLM refuses these options: {error}") from error
        except Exception as error:
            raise InternalError(f"vLLM did not start: {error}") from error
        core = cls(llm, options, model_path, he_lora=he_lora, on_detached=on_detached or _nothing)
        try:
            for adapter in adapters:
                await core.add_adapter(adapter)
        except BaseException:
            core.shutdown()
            raise
        log.info("engine_ready", model=options.base_name, adapters=names)
        return core

    @property
    def adapters(self) -> Mapping[str, ServedAdapter]:
        """What new requests get, by name. Changes as adapters come and go."""
        return self._registry.served

    async def add_adapter(self, connection: AdapterConnection) -> ServedAdapter:
        """Attach an adapter while requests run. Returns when new requests get it.

        Under a name that is served already it replaces that release: requests that run finish on the old one, which is
        then detached. Raises the TenSafeError that kept it from being attached; nothing has changed then.
        """
        if not self.he_lora:
            raise ConfigurationError("this engine was started without private adapters; set enable_he_lora=True")
        return await self._registry.add(connection)

    async def remove_adapter(self, name: str) -> None:
        """Serve an adapter no longer. Returns when its running requests have ended and its keys are destroyed.

        Raises NotFoundError.
        """
        await self._registry.remove(name)

    async def status(self) -> dict[str, Any]:
        """The worker's `tensafe_status`. Raises UnavailableError if it does not answer."""
        try:
            return await asyncio.wait_for(self._call("tensafe_status"), STATUS_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            raise UnavailableError(f"the engine's worker did not answer within {STATUS_SECONDS:g} s") from None

    async def _call(self, method: str, *arguments: Any) -> dict[str, Any]:
        """The first rank's answer to a `tensafe_...` method. A method waits for the step that is running.

        Raises UnavailableError when the engine has died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            answers = await self.llm.collective_rpc(method, args=arguments)
        except EngineDeadError as error:
            raise UnavailableError("vLLM's engine died; its own log lines say why") from error
        return dict(answers[0])

    def route(self, adapter: str | None) -> ModelRoute:
        """The engine client that answers through the present release of `adapter`, or with the base model for None.

        Raises NotFoundError.
        """
        from tensorguard.backends.vllm.routing import ModelRoute

        return ModelRoute(self.llm, None if adapter is None else self._registry.get(adapter))

    @property
    def failed(self) -> bool:
        """Whether the engine's processes died."""
        return bool(self.llm.errored)

    def shutdown(self) -> None:
        """Stop vLLM's processes. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.shutdown)
        self._registry.close()
        self.llm.shutdown(timeout=_END_SECONDS)
        # Its __del__ would do it again, possibly when the interpreter has already taken vLLM's modules apart.
        self.llm.shutdown = lambda timeout=None: None


async def _nothing(adapter: ServedAdapter) -> None:
    return


def engine_arguments(options: EngineOptions, model_path: Path) -> dict[str, Any]:
    """`options` as arguments of vLLM's AsyncEngineArgs."""
    arguments: dict[str, Any] = {
        "model": str(model_path),
        "served_model_name": [options.base_name],
        "dtype": options.dtype,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "seed": options.seed,
        "enforce_eager": options.enforce_eager,
        "trust_remote_code": options.trust_remote_code,
        "tensor_parallel_size": options.tensor_parallel_size,
        # Failed requests must end before the next step is scheduled.
        "async_scheduling": False,
        "disable_log_stats": True,
    }
    optional = {
        "distributed_executor_backend": _executor(options),
        "quantization": options.quantization,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "enable_chunked_prefill": options.enable_chunked_prefill,
        "enable_prefix_caching": options.enable_prefix_caching,
        "speculative_config": _speculative_config(options),
        "kv_cache_memory_bytes": _kv_cache_bytes(options),
    }
    return arguments | {name: value for name, value in optional.items() if value is not None}


def _speculative_config(options: EngineOptions) -> dict[str, Any] | None:
    if options.speculation is None:
        return None
    given: dict[str, Any]
    if options.speculation == "ngram":
        given = {"prompt_lookup_max": options.prompt_lookup_max, "prompt_lookup_min": options.prompt_lookup_min}
    else:
        assert options.speculative_model is not None
        given = {"model": str(resolve_model_path(options.speculative_model))}
    return {
        "method": options.speculation,
        "num_speculative_tokens": options.num_speculative_tokens,
        **{name: value for name, value in given.items() if value is not None},
    }


def _executor(options: EngineOptions) -> str | None:
    """Ranks are processes of this machine, which its evidence covers; never those of others in a Ray cluster."""
    import torch

    if not torch.cuda.is_available():
        return "tensorguard.backends.vllm.executor.SleepingExecutor"
    return "mp" if options.tensor_parallel_size > 1 else None


def _kv_cache_bytes(options: EngineOptions) -> int | None:
    if options.kv_cache_gib is not None:
        return int(options.kv_cache_gib * GIB)
    import torch

    # vLLM on a CPU would take a share of the whole machine's memory.
    return None if torch.cuda.is_available() else GIB
