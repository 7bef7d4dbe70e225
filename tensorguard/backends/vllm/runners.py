"""How vLLM's two model runners say whose rows a forward pass computes.

A runner is watched from outside: some of its methods are wrapped, so that `ForwardPass.start` has the batch before
the model runs, and `ForwardPass.finish` follows. Both runners hand over the same three facts (request ids, adapters,
first rows), and `rows.map_rows` makes of them whose rows are whose. Passes that a runner makes for itself (profiling,
warm-up, capture) go another way and are never announced; padding lies beyond the last request's rows.

- V1 keeps the batch (`input_batch`, `requests`, `query_start_loc`) and runs real passes through `_model_forward`.
- V2 makes a batch anew in `prepare_inputs` and keeps no sampling parameters: `add_requests` is where they pass by. A
  preempted request comes by there again when it is resumed.
"""

from __future__ import annotations

from typing import Any

from tensorguard.backends.vllm.hooks import ForwardPass
from tensorguard.backends.vllm.rows import adapter_of
from tensorguard.errors import ConfigurationError

_V1 = ("_model_forward", "input_batch", "requests", "query_start_loc")
_V2 = ("add_requests", "prepare_inputs", "execute_model")


def watch(runner: Any, forward_pass: ForwardPass) -> None:
    """Announce every real forward pass of `runner` to `forward_pass`.

    Raises ConfigurationError for a runner that is neither of the two, and for options under which a pass's rows are
    not the rows that its hooks see.
    """
    _check(runner)
    if all(hasattr(runner, name) for name in _V1):
        _watch_v1(runner, forward_pass)
    elif all(hasattr(runner, name) for name in _V2):
        _watch_v2(runner, forward_pass)
    else:
        raise ConfigurationError(
            f"{type(runner).__module__}.{type(runner).__qualname__} is not a model runner that private adapters know; "
            "leave VLLM_USE_V2_MODEL_RUNNER and the worker class at their defaults"
        )


def _watch_v1(runner: Any, forward_pass: ForwardPass) -> None:
    forward = runner._model_forward

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        request_ids = batch.req_ids[: batch.num_reqs]
        adapters = [_adapter(runner.requests[request_id].sampling_params) for request_id in request_ids]
        forward_pass.start(request_ids, adapters, runner.query_start_loc.np)
        try:
            return forward(*args, **kwargs)
        finally:
            forward_pass.finish()

    runner._model_forward = model_forward


def _watch_v2(runner: Any, forward_pass: ForwardPass) -> None:
    add, prepare, execute = runner.add_requests, runner.prepare_inputs, runner.execute_model
    adapters: dict[str, str | None] = {}

    def add_requests(scheduler_output: Any) -> None:
        for request_id in {*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())}:
            adapters.pop(request_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            adapters[request.req_id] = _adapter(request.sampling_params)
        add(scheduler_output)

    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        request_ids = batch.req_ids[: batch.num_reqs]
        forward_pass.start(request_ids, [adapters[request_id] for request_id in request_ids], batch.query_start_loc_np)
        return batch

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        try:
            return execute(*args, **kwargs)
        finally:
            forward_pass.finish()

    runner.add_requests, runner.prepare_inputs, runner.execute_model = add_requests, prepare_inputs, execute_model


def _adapter(sampling_params: Any) -> str | None:
    return None if sampling_params is None else adapter_of(sampling_params.extra_args)


def _check(runner: Any) -> None:
    config = runner.vllm_config
    parallel, speculative = config.parallel_config, config.speculative_config
    refused = {
        "async_scheduling": config.scheduler_config.async_scheduling,
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size > 1,
        "enable_dbo or ubatch_size": parallel.use_ubatching,
        # The rows of drafts are then dealt out on the GPU, where nobody here sees them.
        "enable_adaptive_verification": speculative is not None and speculative.enable_adaptive_verification,
    }
    if found := [name for name, used in refused.items() if used]:
        raise ConfigurationError(
            f"vLLM's {', '.join(found)} cannot be used together with private adapters; turn it off"
        )
