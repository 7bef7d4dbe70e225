"""vLLM's worker with HE-LoRA hooks in its model.

The worker process holds everything secret of the host's side: its attested identity, the CKKS secret keys
and the ciphertext streams. In come endpoints, paths and public keys (`WorkerSettings`, through
`additional_config`, and an `AdapterConnection` for each adapter); out go tokens, the ids of requests that lack a
delta, and the numbers of `tensafe_status`.

The methods `tensafe_...` are called by the serving process with vLLM's `collective_rpc`, on every rank and between
two steps. They never hold a step up: what takes long runs in a thread (`attachments`). A request that names an
adapter which is not attached fails, since no source of deltas is there.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import structlog
import torch
from vllm.platforms import current_platform
from vllm.v1.outputs import ModelRunnerOutput

from tensorguard.backends.vllm.attachments import Attachments, Connects
from tensorguard.backends.vllm.compiled import register_layers, split_at_hooks
from tensorguard.backends.vllm.config import AdapterConnection, WorkerSettings
from tensorguard.backends.vllm.connect import Connector
from tensorguard.backends.vllm.failures import StepOutput
from tensorguard.backends.vllm.hooks import ForwardPass
from tensorguard.backends.vllm.install import Hooks, install_hooks
from tensorguard.backends.vllm.lifetime import exit_with_parent
from tensorguard.backends.vllm.rows import adapter_of
from tensorguard.errors import ConfigurationError, TenSafeError
from tensorguard.observability.logging import configure_logging

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker

log = structlog.get_logger(__name__)


class HeLoraWorker(BaseWorker):
    """A CPU or GPU worker (whichever this platform has) that serves adapters through their coprocessors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        exit_with_parent()
        if not structlog.is_configured():  # a process of its own, where nobody did it yet
            configure_logging("engine", stream=sys.stderr)
        split_at_hooks(self.vllm_config.compilation_config)
        self.tensafe_settings = cast("WorkerSettings", self.vllm_config.additional_config)
        self.tensafe_attachments: Attachments | None = None
        self.tensafe_hooks: Hooks | None = None
        self.forward_pass: ForwardPass | None = None

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        self.forward_pass = ForwardPass({}, self.device, self.tensafe_settings.delta_timeout_seconds)
        self.tensafe_hooks = install_hooks(self.get_model(), self.forward_pass)
        register_layers(self.get_model(), self.vllm_config.compilation_config.static_forward_context)
        self.tensafe_attachments = Attachments(self.connector(), self.tensafe_hooks)
        self._watch_forward_passes(self.forward_pass)

    def connector(self) -> Connects:
        """What opens the sessions with coprocessors."""
        return Connector(self.tensafe_settings)

    def _watch_forward_passes(self, forward_pass: ForwardPass) -> None:
        """Tell `forward_pass` before each real forward pass whose rows are in it (profiling does not pass
        here)."""
        runner = self.model_runner
        forward = getattr(runner, "_model_forward", None)
        if forward is None or not hasattr(runner, "input_batch"):
            raise ConfigurationError(
                f"{type(runner).__module__} is not a runner the hooks know; set VLLM_USE_V2_MODEL_RUNNER=0"
            )

        def model_forward(*args: Any, **kwargs: Any) -> Any:
            batch = runner.input_batch
            request_ids = batch.req_ids[: batch.num_reqs]
            parameters = (runner.requests[request_id].sampling_params for request_id in request_ids)
            adapters = [None if p is None else adapter_of(p.extra_args) for p in parameters]
            forward_pass.start(request_ids, adapters, runner.query_start_loc.np)
            try:
                return forward(*args, **kwargs)
            finally:
                forward_pass.finish()

        runner._model_forward = model_forward

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        output = super().sample_tokens(grammar_output)
        failed = self.forward_pass.take_failed() if self.forward_pass is not None else frozenset()
        if not failed:
            return output
        if not isinstance(output, ModelRunnerOutput):
            raise RuntimeError(f"cannot remove tokens from a {type(output).__name__}; async scheduling must be off")
        return StepOutput.without(output, failed)

    def tensafe_attach(self, connection: dict[str, Any]) -> dict[str, Any]:
        """Start to attach the adapter of an `AdapterConnection`: {"ticket": number for `tensafe_attach_outcome`}."""
        assert self.tensafe_attachments is not None
        return {"ticket": self.tensafe_attachments.begin(AdapterConnection.model_validate(connection))}

    def tensafe_attach_outcome(self, ticket: int) -> dict[str, Any]:
        """How an attempt stands: {"adapter": None} while it is under way, then its description or the error."""
        assert self.tensafe_attachments is not None
        try:
            return {"adapter": self.tensafe_attachments.outcome(ticket)}
        except TenSafeError as error:
            return refusal(error)

    def tensafe_detach(self, key: str) -> dict[str, Any]:
        """Detach an adapter: {} or the error."""
        assert self.tensafe_attachments is not None
        try:
            self.tensafe_attachments.detach(key)
        except TenSafeError as error:
            return refusal(error)
        return {}

    def tensafe_status(self) -> dict[str, Any]:
        """Numbers and names for status pages."""
        assert self.tensafe_attachments is not None
        assert self.tensafe_hooks is not None
        assert self.forward_pass is not None
        counters = self.forward_pass.counters
        return {
            "hooked_layers": len(self.tensafe_hooks.methods),
            "forward_passes": counters.forward_passes,
            "adapted_rows": counters.adapted_rows,
            "hook_seconds": counters.hook_seconds,
            "base_seconds": counters.base_seconds,
            "calls": counters.calls,
            "failed_calls": counters.failed_calls,
            **self.tensafe_attachments.status(),
        }

    def shutdown(self) -> None:
        if self.tensafe_attachments is not None:
            self.tensafe_attachments.close()
            self.tensafe_attachments = None
        super().shutdown()


def refusal(error: TenSafeError) -> dict[str, Any]:
    """An error on its way to the serving process, which raises it there (vLLM would not keep its type)."""
    return {"error": {"reason": error.reason, "message": error.message}}
