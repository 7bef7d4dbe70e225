"""One engine client per served model name.

vLLM's serving code gets a `ModelRoute` in place of the engine. The route decides base or adapter for
*every* request that goes through it, so no code path of the serving classes (beam search, several prompts,
tools) can forget to.

For an adapter each request carries the adapter's key (`SamplingParams.extra_args`, read by the worker) and
a cache salt made of the adapter's digest and an epoch: KV blocks computed with an adapter never serve
another adapter, another release, the base model, or a time after a failed delta.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

from vllm.engine.protocol import EngineClient
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from tensorguard.backends.vllm.failures import ENDINGS
from tensorguard.backends.vllm.rows import ADAPTER_ARGUMENT, adapter_key
from tensorguard.errors import InvalidInputError, NotFoundError


@dataclass(slots=True, eq=False)
class ServedAdapter:
    """One release of an adapter that the worker has attached, and the requests that run on it."""

    name: str
    digest: str
    """SHA-256 of the manifest, hex."""
    sequence: int
    epoch: int = 0
    """Moves whenever a delta failed."""
    in_flight: int = 0
    """Requests that hold it; a retired adapter is detached when there are none."""
    _retired: bool = False
    _idle: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def key(self) -> str:
        """What the worker knows it by."""
        return adapter_key(self.name, self.digest)

    @property
    def cache_salt(self) -> str:
        """Given to all its requests, so that only they share KV blocks."""
        return f"tensafe:{self.digest}:{self.epoch}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep it attached meanwhile. Raises NotFoundError once it has been retired and nobody holds it."""
        if self._retired and not self.in_flight:
            raise NotFoundError(f"adapter {self.name!r} is no longer served in this release; ask again")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            if self._retired and not self.in_flight:
                self._idle.set()

    async def retire(self) -> None:
        """Return when the requests that hold it have ended. Only they may still begin further ones."""
        self._retired = True
        if self.in_flight:
            await self._idle.wait()


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

    def held(self) -> AbstractContextManager[None]:
        """Keep this route's adapter attached for a request that makes several calls of `generate`, one after another.

        Raises NotFoundError when it is gone.
        """
        return nullcontext() if self.adapter is None else self.adapter.held()

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """vLLM's `generate`, through this route's adapter.

        prompt: a rendered engine input, or a mapping with "prompt" or "prompt_token_ids".
        Raises DeltaUnavailable, LeaseExpired or BudgetExhausted when a delta was missing; what was yielded before is
        complete and correct. Raises NotFoundError when the adapter is gone.
        """
        prompt, sampling_params = self._bind(prompt, sampling_params, options)
        outputs = cast(
            "AsyncGenerator[RequestOutput, None]",
            self._engine.generate(prompt, sampling_params, request_id, **options),
        )
        # The adapter is let go of last: by then the engine has heard of an abort.
        with self.held():
            async with aclosing(outputs):
                async for output in outputs:
                    self._check(output)
                    yield output

    def _check(self, output: RequestOutput) -> None:
        for choice in output.outputs:
            # The finish reason tells our reason from a user's stop string that reads like it.
            if choice.finish_reason == "error" and choice.stop_reason in ENDINGS:
                if self.adapter is not None:
                    self.adapter.epoch += 1
                raise ENDINGS[choice.stop_reason]

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
        bound.extra_args = {**(bound.extra_args or {}), ADAPTER_ARGUMENT: self.adapter.key}
        return {**prompt, "cache_salt": self.adapter.cache_salt}, bound
