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
from functools import partial
from typing import Any, cast

import structlog
import torch
from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from tensorguard.backends.vllm.attachments import Attachments, Connects
from tensorguard.backends.vllm.compiled import register_layers, split_at_hooks
from tensorguard.backends.vllm.config import AdapterConnection, WorkerSettings
from tensorguard.backends.vllm.connect import Connector
from tensorguard.backends.vllm.failures import StepOutput
from tensorguard.backends.vllm.hooks import ForwardPass
from tensorguard.backends.vllm.install import Hooks, install_hooks
from tensorguard.backends.vllm.lifetime import end_at_once, end_with_parent
from tensorguard.backends.vllm.parallel import Ranks, SharedAttachments, share
from tensorguard.backends.vllm.runners import watch
from tensorguard.errors import TenSafeError
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
        end_with_parent()
        if not structlog.is_configured():  # a process of its own, where nobody did it yet
            configure_logging("engine", stream=sys.stderr)
        split_at_hooks(self.vllm_config.compilation_config)
        self.tensafe_settings = cast("WorkerSettings", self.vllm_config.additional_config)
        self.tensafe_attachments: Attachments | SharedAttachments | None = None
        self.tensafe_hooks: Hooks | None = None
        self.forward_pass: ForwardPass | None = None

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        self.forward_pass = ForwardPass({}, self.device, self.tensafe_settings.delta_timeout_seconds)
        self.tensafe_hooks = install_hooks(self.get_model(), self.forward_pass)
        register_layers(self.get_model(), self.vllm_config.compilation_config.static_forward_context)
        self.tensafe_attachments = self._attachments(self.tensafe_hooks)
        watch(self.model_runner, self.forward_pass)

    def _attachments(self, hooks: Hooks) -> Attachments | SharedAttachments:
        ranks = Ranks.of_engine()
        if ranks.size == 1:
            return Attachments(self.connector(), hooks)
        leading = Attachments(self.connector(), hooks, partial(share, ranks)) if ranks.leads else None
        return SharedAttachments(ranks, hooks, leading)

    def connector(self) -> Connects:
        """What opens the sessions with coprocessors."""
        return Connector(self.tensafe_settings)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        output = super().sample_tokens(grammar_output)
        failed = self.forward_pass.take_failed() if self.forward_pass is not None else {}
        if not failed:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            # The V2 runner's tokens are still on their way from the GPU, however steps are scheduled.
            output = output.get_output()
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
            "adapted_requests": counters.adapted_requests,
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
        end_at_once()


def refusal(error: TenSafeError) -> dict[str, Any]:
    """An error on its way to the serving process, which raises it there (vLLM would not keep its type)."""
    return {"error": {"reason": error.reason, "message": error.message}}
