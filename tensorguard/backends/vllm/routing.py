"""One engine client per served model name.

vLLM's serving code gets a `ModelRoute` in place of the engine. The route decides base or adapter for
*every* request that goes through it, so no code path of the serving classes (beam search, several prompts,
tools) can forget to.

For an adapter each request carries the adapter's name (`SamplingParams.extra_args`, read by the worker) and
a cache salt made of the adapter's digest and an epoch: KV blocks computed with an adapter never serve
another adapter, the base model, or a time after a failed delta.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from vllm.engine.protocol import EngineClient
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from tensorguard.backends.vllm.failures import DELTA_UNAVAILABLE, DeltaUnavailable
from tensorguard.backends.vllm.rows import ADAPTER_ARGUMENT
from tensorguard.errors import InvalidInputError


@dataclass(slots=True)
class ServedAdapter:
    """An adapter that the worker has attached."""

    name: str
    digest: str
    sequence: int
    epoch: int = 0
    """Moves whenever a delta failed."""

    @property
    def cache_salt(self) -> str:
        return f"tensafe:{self.digest}:{self.epoch}"


class ModelRoute:
    """The engine as one model name sees it: `adapter` None is the base model.

    Offers exactly what vLLM's OpenAI serving classes use of an engine client.
    """

    def __init__(self, engine: EngineClient, adapter: ServedAdapter | None) -> None:
        self._engine = engine
        self.adapter = adapter
        self.vllm_config = engine.vllm_config
        self.model_config = engine.model_config
        self.renderer = engine.renderer
        self.input_processor = engine.input_processor

    @property
    def errored(self) -> bool:
        return self._engine.errored

    @property
    def dead_error(self) -> BaseException:
        return self._engine.dead_error

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        self._engine.check_admission(n, request_id)

    async def is_tracing_enabled(self) -> bool:
        return await self._engine.is_tracing_enabled()

    async def abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """vLLM's `generate`, through this route's adapter.

        prompt: a rendered engine input, or a mapping with "prompt" or "prompt_token_ids".
        Raises DeltaUnavailable when a delta was missing; what was yielded before is complete and correct.
        """
        prompt, sampling_params = self._bind(prompt, sampling_params, options)
        outputs = cast(
            "AsyncGenerator[RequestOutput, None]",
            self._engine.generate(prompt, sampling_params, request_id, **options),
        )
        async with aclosing(outputs):
            async for output in outputs:
                # The finish reason tells our reason from a user's stop string that reads like it.
                if any(c.finish_reason == "error" and c.stop_reason == DELTA_UNAVAILABLE for c in output.outputs):
                    if self.adapter is not None:
                        self.adapter.epoch += 1
                    raise DeltaUnavailable
                yield output

    def _bind(
        self, prompt: Any, sampling_params: SamplingParams, options: dict[str, Any]
    ) -> tuple[dict[str, Any], SamplingParams]:
        if not isinstance(prompt, dict):
            raise InvalidInputError(f"a prompt must be a mapping here, not {type(prompt).__name__}")
        if options.get("lora_request") is not None:
            raise InvalidInputError("lora_request is not accepted; the model name chooses the adapter")
        if ADAPTER_ARGUMENT in (sampling_params.extra_args or {}) or "cache_salt" in prompt:
            raise InvalidInputError(f"{ADAPTER_ARGUMENT} and cache_salt are set by the server only")
        if self.adapter is None:
            return prompt, sampling_params
        if "decoder_prompt" in prompt:
            raise InvalidInputError("encoder-decoder models cannot be served through an adapter")
        # Beam search passes one SamplingParams object to many requests.
        bound = sampling_params.clone()
        bound.extra_args = {**(bound.extra_args or {}), ADAPTER_ARGUMENT: self.adapter.name}
        return {**prompt, "cache_salt": self.adapter.cache_salt}, bound
