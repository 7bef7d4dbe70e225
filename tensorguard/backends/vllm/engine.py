"""`TenSafeAsyncEngine`: a base model and private adapters behind a few coroutines.

config = TenSafeVLLMConfig(model=..., tssp_package_path="adapter.tssp", enable_he_lora=True)
engine = TenSafeAsyncEngine(config)
async for token in engine.generate_stream("Explain homomorphic encryption:"):
    print(token, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import atexit
import sys
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import structlog

from tensorguard.backends.vllm.config import AdapterConnection, TenSafeVLLMConfig
from tensorguard.backends.vllm.core import EngineCore
from tensorguard.backends.vllm.lifetime import end_as_before, end_in_order
from tensorguard.backends.vllm.sources import AdapterSources
from tensorguard.errors import (
    AbortedError,
    ConfigurationError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)

if TYPE_CHECKING:
    from tensorguard.backends.vllm.routing import ServedAdapter


class TenSafeAsyncEngine:
    """Generates text with private adapters, or with the base model.

    Starts at the first use (or in `start`, or on entering the context) and belongs to the event loop it was
    started in. Adapters given as packages are served by an attestor and coprocessors of its own, as separate
    processes. `shutdown`, leaving the context, or the end of this process, also by SIGTERM or SIGINT, stops
    everything it started.
    """

    def __init__(self, config: TenSafeVLLMConfig) -> None:
        if not structlog.is_configured():
            # The caller's standard output is the caller's.
            structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
        self.config = config
        self._core: EngineCore | None = None
        self._sources = AdapterSources(config)
        self._starting = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._additions: set[asyncio.Task[str]] = set()

    async def start(self) -> EngineCore:
        """Start whatever is not running yet. vLLM's start blocks the event loop while the model loads.

        Raises the TenSafeError that says what to change.
        """
        async with self._starting:
            if self._core is None:
                atexit.register(self._stop)
                end_in_order()
                try:
                    self._core = await self._start()
                except BaseException:
                    self._stop()
                    end_as_before()
                    raise
            return self._core

    async def generate_stream(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: str | None = None,
        use_adapter: bool = True,
        request_id: str | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> AsyncGenerator[str, None]:
        """Continue `prompt` (raw text or token ids, no chat template) and yield the text in pieces, as they are
        generated.

        Greedy unless `temperature` says otherwise. `adapter` is the adapter's name; it may be left out where there is
        one, and `use_adapter=False` asks the base model. `request_id` is what `abort` takes.

        Raises DeltaUnavailableError when the adapter cannot be computed (what was yielded before is correct),
        AbortedError when `abort` ended the request, NotFoundError for an adapter that is not there, InvalidInputError
        for what cannot be generated, UnavailableError when the engine has died. Breaking out of the loop aborts the
        request.
        """
        core = await self.start()
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        route = core.route(self._choose(core, adapter) if use_adapter else None)
        given: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
        try:
            parameters = SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                stop=list(stop),
                seed=seed,
                output_kind=RequestOutputKind.DELTA,
            )
            async with aclosing(route.generate(given, parameters, request_id or uuid.uuid4().hex)) as outputs:
                async for output in outputs:
                    (choice,) = output.outputs
                    if choice.text:
                        yield choice.text
                    if choice.finish_reason == "abort":
                        raise AbortedError("the request was aborted before it was complete")
        except (VLLMClientError, ValueError) as error:  # options and prompts that cannot be served
            raise InvalidInputError(str(error)) from error
        except EngineDeadError as error:
            raise UnavailableError("vLLM's engine died; its own log lines say why") from error

    async def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """The whole continuation at once; options and errors as in `generate_stream`."""
        return "".join([piece async for piece in self.generate_stream(prompt, **options)])

    async def chat_stream(self, messages: Sequence[Mapping[str, str]], **options: Any) -> AsyncGenerator[str, None]:
        """Yield the answer to a conversation (`role` and `content` of each message), put into the model's chat
        template. Options and errors as in `generate_stream`."""
        core = await self.start()
        async with aclosing(self.generate_stream(_templated(core, messages), **options)) as pieces:
            async for piece in pieces:
                yield piece

    async def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """The whole answer at once; as `chat_stream`."""
        return "".join([piece async for piece in self.chat_stream(messages, **options)])

    async def abort(self, request_id: str) -> None:
        """End a request early: whoever reads it gets AbortedError. Without effect where it has ended already."""
        core = await self.start()
        await core.llm.abort(request_id)

    async def add_adapter(self, adapter: Path | str | AdapterConnection, name: str | None = None) -> str:
        """Serve one more adapter, while requests run: a sealed package (an embedded coprocessor is started for it) or a
        running coprocessor's. Returns its name when requests can use it; `name` insists on one.

        A new release of an adapter that is served replaces it: requests that run finish on the old one. Raises the
        TenSafeError that says what to change; what was served is then served as before.
        """
        core = await self.start()
        if not core.he_lora:
            raise ConfigurationError("this engine was started without private adapters; set enable_he_lora=True")
        if isinstance(adapter, AdapterConnection):
            return await self._add_given(core, adapter, name)
        # Finished even if the caller is cancelled: a coprocessor that was started is either attached or stopped.
        addition = asyncio.create_task(self._add_package(core, adapter, name))
        self._additions.add(addition)
        addition.add_done_callback(self._additions.discard)
        return await asyncio.shield(addition)

    async def remove_adapter(self, name: str) -> None:
        """Serve an adapter no longer. Returns when its running requests have ended and its keys are destroyed.

        Raises NotFoundError.
        """
        core = await self.start()
        await core.remove_adapter(name)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are served now."""
        return () if self._core is None else tuple(self._core.adapters)

    async def status(self) -> dict[str, Any]:
        """What the engine's worker reports: evidence kinds, bytes and seconds spent on encrypted
        computation."""
        core = await self.start()
        return await core.status() if core.he_lora else {"evidence_kind": "", "adapters": []}

    async def shutdown(self) -> None:
        """Stop vLLM and the embedded services. Safe to call again; a later use starts them anew."""
        async with self._starting:
            await asyncio.to_thread(self._stop)
            end_as_before()

    async def __aenter__(self) -> TenSafeAsyncEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    async def _start(self) -> EngineCore:
        config = self.config
        if not config.enable_he_lora:
            return await EngineCore.start(config.engine_options(), he_lora=False)
        connections = await asyncio.to_thread(self._sources.open)
        return await EngineCore.start(
            config.engine_options(),
            connections,
            require_attestation=not config.simulated_evidence_permitted,
            simulated_root_key=self._sources.simulated_root_key,
            plaintext_network=config.plaintext_network,
            delta_timeout_seconds=config.delta_timeout_seconds,
            on_detached=self._release,
        )

    def _choose(self, core: EngineCore, adapter: str | None) -> str | None:
        """The adapter that a request without `use_adapter=False` means. Never quietly the base model."""
        if adapter is not None or not core.he_lora:
            return adapter
        names = list(core.adapters)
        if len(names) == 1:
            return names[0]
        if not names:
            raise NotFoundError("no adapter is served now; add one, or set use_adapter=False to ask the base model")
        raise InvalidInputError(
            f"there are several adapters; choose one with adapter= ({', '.join(names)}), or set use_adapter=False to "
            "ask the base model"
        )

    async def _add_given(self, core: EngineCore, connection: AdapterConnection, name: str | None) -> str:
        if name is not None and name != connection.name:
            raise ConfigurationError(f"the connection is to adapter {connection.name!r}, not {name!r}; leave name out")
        if self.config.require_attestation is None:
            # Embedded services may simulate evidence, others may not.
            connection = connection.model_copy(update={"require_attestation": True})
        return (await core.add_adapter(connection)).name

    async def _add_package(self, core: EngineCore, package: Path | str, name: str | None) -> str:
        async with self._changing:
            connection = await asyncio.to_thread(self._sources.add, package, name)
            try:
                return (await core.add_adapter(connection)).name
            except BaseException:
                assert connection.expected_digest is not None
                await asyncio.to_thread(self._sources.release, connection.expected_digest)
                raise

    async def _release(self, adapter: ServedAdapter) -> None:
        """Stop the coprocessor of an adapter that has been detached, if it is one of ours."""
        async with self._changing:
            await asyncio.to_thread(self._sources.release, adapter.digest)

    def _stop(self) -> None:
        atexit.unregister(self._stop)
        core, self._core = self._core, None
        try:
            if core is not None:
                core.shutdown()
        finally:
            self._sources.close()


def _templated(core: EngineCore, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation, up to where the answer begins. Raises InvalidInputError."""
    from jinja2 import TemplateError

    tokenizer = core.llm.get_tokenizer()
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except (ValueError, TypeError, KeyError, TemplateError) as error:
        raise InvalidInputError(
            f"the model's chat template does not take these messages ({type(error).__name__}); give each a role and "
            "content, or use generate where the model has no template"
        ) from error
    return list(tokenizer(text, add_special_tokens=False).input_ids)
