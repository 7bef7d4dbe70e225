"""`TenSafeAsyncEngine`: a base model and one private adapter behind two coroutines.

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
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import structlog

from tensorguard.backends.vllm.config import AdapterConnection, TenSafeVLLMConfig
from tensorguard.backends.vllm.core import EngineCore
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import EvidenceRefusedError

if TYPE_CHECKING:
    from tensorguard.stack.embedded import Embedded


class TenSafeAsyncEngine:
    """Generates text with the configured adapter, or with the base model where none is configured.

    Starts at the first use (or in `start`, or on entering the context) and belongs to the event loop it was
    started in. Without endpoints it starts an attestor and a coprocessor of its own, as separate processes.
    `shutdown`, leaving the context, or the end of this process stops everything it started.
    """

    def __init__(self, config: TenSafeVLLMConfig) -> None:
        if not structlog.is_configured():
            # The caller's standard output is the caller's.
            structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
        self.config = config
        self._core: EngineCore | None = None
        self._embedded: Embedded | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> EngineCore:
        """Start whatever is not running yet. vLLM's start blocks the event loop while the model loads.

        Raises the TenSafeError that says what to change.
        """
        async with self._starting:
            if self._core is None:
                atexit.register(self._stop)
                try:
                    self._core = await self._start()
                except BaseException:
                    self._stop()
                    raise
            return self._core

    async def generate_stream(
        self,
        prompt: str,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        use_adapter: bool = True,
    ) -> AsyncIterator[str]:
        """Continue `prompt` (raw text, no chat template) and yield the text in pieces, as they are generated.

        Greedy unless `temperature` says otherwise. `use_adapter=False` asks the base model. Raises
        DeltaUnavailableError when the adapter cannot be computed; what was yielded before is correct.
        Breaking out of the loop aborts the request.
        """
        core = await self.start()
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        parameters = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=list(stop),
            seed=seed,
            output_kind=RequestOutputKind.DELTA,
        )
        route = core.route(next(iter(core.adapters), None) if use_adapter else None)
        async with aclosing(route.generate({"prompt": prompt}, parameters, uuid.uuid4().hex)) as outputs:
            async for output in outputs:
                if text := output.outputs[0].text:
                    yield text

    async def generate(self, prompt: str, **options: Any) -> str:
        """The whole continuation at once; options as in `generate_stream`."""
        return "".join([piece async for piece in self.generate_stream(prompt, **options)])

    async def status(self) -> dict[str, Any]:
        """What the engine's worker reports: evidence kinds, bytes and seconds spent on encrypted
        computation."""
        core = await self.start()
        return await core.status() if self.config.enable_he_lora else {"evidence_kind": "", "adapters": []}

    async def shutdown(self) -> None:
        """Stop vLLM and the embedded services. Safe to call again; a later use starts them anew."""
        async with self._starting:
            await asyncio.to_thread(self._stop)

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
        if config.coprocessor_endpoint is not None:
            connection, root_key = self._given(), config.simulated_root_key
        else:
            connection, root_key = await asyncio.to_thread(self._start_embedded)
        return await EngineCore.start(
            config.engine_options(),
            [connection],
            require_attestation=not config.simulated_evidence_permitted,
            simulated_root_key=root_key,
            delta_timeout_seconds=config.delta_timeout_seconds,
        )

    def _given(self) -> AdapterConnection:
        """The running services that the configuration names; a package file pins what they serve."""
        config = self.config
        assert config.coprocessor_endpoint is not None
        assert config.attestor_endpoint is not None
        name, digest = config.adapter_name, None
        if config.tssp_package_path is not None:
            from tensorguard.package import open_manifest
            from tensorguard.package.base_model import check_base_model_folder

            keys = [VerifyingKeys.read(path) for path in config.publisher_keys]
            verified = open_manifest(config.tssp_package_path, keys)
            check_base_model_folder(verified.manifest, config.model)
            name, digest = name or verified.manifest.package_id, verified.digest
        assert name is not None
        return AdapterConnection(
            name=name,
            coprocessor_endpoint=config.coprocessor_endpoint,
            attestor_endpoint=config.attestor_endpoint,
            attestor_thumbprint=config.attestor_thumbprint,
            tenant=config.tenant,
            publisher_keys=config.publisher_keys,
            expected_digest=digest,
            checked=config.he_checked_mode,
        )

    def _start_embedded(self) -> tuple[AdapterConnection, Path]:
        config = self.config
        if not config.simulated_evidence_permitted:
            raise EvidenceRefusedError(
                "the embedded services have no evidence from TEE hardware, only simulated evidence, which "
                "require_attestation=True refuses; leave it out or set require_attestation=False "
                "to permit it (for development), or give coprocessor_endpoint and attestor_endpoint"
            )
        from tensorguard.stack.embedded import start_embedded

        assert config.tssp_package_path is not None
        self._embedded = start_embedded(
            config.tssp_package_path,
            adapter_name=config.adapter_name,
            state_dir=config.state_dir,
            publisher_keys=config.publisher_keys,
            base_model=config.model,
        )
        trust, adapter = self._embedded.trust, self._embedded.adapter
        connection = AdapterConnection(
            name=adapter.name,
            coprocessor_endpoint=trust.coprocessor,
            attestor_endpoint=trust.attestor,
            attestor_thumbprint=trust.attestor_thumbprint,
            tenant=adapter.tenant,
            publisher_keys=adapter.publisher_keys,
            expected_digest=adapter.digest,
            checked=config.he_checked_mode,
        )
        return connection, trust.simulated_root_key

    def _stop(self) -> None:
        atexit.unregister(self._stop)
        core, self._core = self._core, None
        embedded, self._embedded = self._embedded, None
        try:
            if core is not None:
                core.shutdown()
        finally:
            if embedded is not None:
                embedded.close()
