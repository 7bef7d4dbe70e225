"""`InferenceService`: model names, one OpenAI request at a time, adapters that come and go, and status."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from typing import Any

import grpc
import structlog
from pydantic import ValidationError

from services.inference.answers import (
    Answer,
    ModelAnswers,
    error_answer,
    error_document,
    json_answer,
    make_renderer,
    parse_body,
)
from tensorguard import __version__
from tensorguard.backends.vllm.config import AdapterConnection, BaseNameAnswers, explain
from tensorguard.backends.vllm.core import EngineCore
from tensorguard.backends.vllm.routing import ServedAdapter
from tensorguard.errors import InvalidInputError, TenSafeError, UnavailableError
from tensorguard.rpc.authorisation import PUBLIC, REFUSED, Rule, bearer, both, certified
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2 as pb2

log = structlog.get_logger(__name__)

STATUS_SECONDS = 2.0
NOT_FOUND = 404


def rules(secret: str | None, admin_secret: str | None, *, tls: bool = False) -> dict[str, Rule]:
    """Who may call: whoever reaches the port, or only callers that know `secret`. Changing which adapters are served
    always takes `admin_secret`. With `tls` all of them must be certified gateways, too."""
    use = PUBLIC if secret is None else bearer(secret)
    change = REFUSED if admin_secret is None else bearer(admin_secret)
    if tls:
        gateway = certified("gateway")
        use, change = both(gateway, use), both(gateway, change)
    return {
        "ListModels": use,
        "Complete": use,
        "GetStatus": use,
        "AttachAdapter": change,
        "DetachAdapter": change,
    }


class InferenceServicer:
    """Answers for one engine. The base model and each adapter have a name of their own."""

    def __init__(
        self, core: EngineCore, *, base_name_answers: BaseNameAnswers = "base", tool_parser: str | None = None
    ) -> None:
        self._core = core
        self._created = int(time.time())
        self._base_name = core.options.base_name
        self._base_adapter = next(iter(core.adapters)) if base_name_answers == "adapter" else None
        self._tool_parser = tool_parser
        self._renderer = make_renderer(core.route(None), tool_parser)
        self._models: dict[str, ModelAnswers] = {}
        self._status: dict[str, Any] | None = None
        self._asking: asyncio.Task[dict[str, Any]] | None = None
        if self._base_adapter is not None:
            log.info("base_name_answered_by_adapter", name=self._base_name, adapter=self._base_adapter)

    async def ListModels(self, request: pb2.ListModelsRequest, context: Any) -> pb2.ListModelsResponse:  # noqa: N802
        return pb2.ListModelsResponse(models=[self._describe(model) for model in self._served().values()])

    def _served(self) -> dict[str, ModelAnswers]:
        """Every name that is answered now. A replaced release has answers of its own, so that a request that came
        before stays on the old one."""
        adapters = self._core.adapters
        names: dict[str, ServedAdapter | None] = dict(adapters)
        if self._base_adapter is None or self._base_adapter in adapters:
            base = None if self._base_adapter is None else adapters[self._base_adapter]
            names = {self._base_name: base, **names}
        self._models = {name: self._answers(name, adapter) for name, adapter in names.items()}
        return self._models

    def _answers(self, name: str, adapter: ServedAdapter | None) -> ModelAnswers:
        known = self._models.get(name)
        if known is not None and known.adapter is adapter:
            return known
        route = self._core.route(None if adapter is None else adapter.name)
        return ModelAnswers(name, route, self._renderer, self._tool_parser)

    def _describe(self, model: ModelAnswers) -> pb2.Model:
        is_base = model.name == self._base_name
        return pb2.Model(
            name=model.name,
            parent="" if is_base else self._base_name,
            adapter_digest=model.adapter.digest if model.adapter else "",
            adapter_sequence=model.adapter.sequence if model.adapter else 0,
            created=self._created,
            max_model_length=self._core.llm.model_config.max_model_len,
            answered_by_adapter=is_base and model.adapter is not None,
        )

    async def Complete(  # noqa: N802
        self, request: pb2.CompleteRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb2.CompleteResponse]:
        """A caller that cancels, or goes away, aborts the generation."""
        with ExitStack() as held:
            answer = await self._answer(request, held)
            head = pb2.ResponseHead(status=int(answer.status), content_type=answer.content_type)
            yield pb2.CompleteResponse(head=head)
            async with aclosing(answer.body) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    yield pb2.CompleteResponse(body=piece)

    async def _answer(self, request: pb2.CompleteRequest, held: ExitStack) -> Answer:
        try:
            document = parse_body(request.body, request.request_id)
        except InvalidInputError as error:
            return await error_answer(error)
        models = self._served()
        model = models.get(document["model"])
        if model is None:
            message = f"The model `{document['model']}` does not exist; there are: {', '.join(models)}."
            return await json_answer(NOT_FOUND, error_document(NOT_FOUND, message, "model_not_found", "model"))
        # Beam search and several prompts are many calls of the engine: all on the release that this one found.
        held.enter_context(model.held())
        if request.endpoint == pb2.ENDPOINT_CHAT_COMPLETIONS:
            return await model.chat(document)
        if request.endpoint == pb2.ENDPOINT_COMPLETIONS:
            return await model.completions(document)
        raise InvalidInputError("endpoint must be ENDPOINT_CHAT_COMPLETIONS or ENDPOINT_COMPLETIONS")

    async def AttachAdapter(  # noqa: N802
        self, request: pb2.AttachAdapterRequest, context: Any
    ) -> pb2.AttachAdapterResponse:
        """Returns when new requests get the adapter; also where its caller has gone meanwhile."""
        served = await self._core.add_adapter(connection_of(request.adapter))
        return pb2.AttachAdapterResponse(model=self._describe(self._answers(served.name, served)))

    async def DetachAdapter(  # noqa: N802
        self, request: pb2.DetachAdapterRequest, context: Any
    ) -> pb2.DetachAdapterResponse:
        """Returns when the adapter's running requests have ended and its keys are destroyed."""
        await self._core.remove_adapter(request.name)
        return pb2.DetachAdapterResponse()

    async def GetStatus(self, request: pb2.GetStatusRequest, context: Any) -> pb2.GetStatusResponse:  # noqa: N802
        status = await self._worker_status()
        return pb2.GetStatusResponse(
            version=__version__,
            model=self._base_name,
            evidence_kind=status["evidence_kind"],
            adapters=[adapter_status(adapter) for adapter in status["adapters"]],
        )

    async def _worker_status(self) -> dict[str, Any]:
        """The worker answers between two steps. While a long one runs, the numbers before it are what there
        is."""
        if self._core.failed:
            raise UnavailableError("the engine has stopped; restart the inference service")
        if self._asking is None:
            self._asking = asyncio.create_task(self._core.status())
        done, _ = await asyncio.wait({self._asking}, timeout=STATUS_SECONDS if self._status else None)
        if done:
            task, self._asking = self._asking, None
            try:
                self._status = task.result()
            except TenSafeError as error:
                if self._status is None:
                    raise
                log.warning("status_is_old", reason=error.reason, cause=error.message)
        assert self._status is not None
        return self._status


def connection_of(adapter: pb2.AdapterConnection) -> AdapterConnection:
    """What a caller wants attached. Raises InvalidInputError naming the field that is wrong."""
    try:
        return AdapterConnection(
            name=adapter.name,
            coprocessor_endpoint=adapter.coprocessor_endpoint,
            attestor_endpoint=adapter.attestor_endpoint,
            attestor_thumbprint=adapter.attestor_thumbprint or None,
            tenant=adapter.tenant or "default",
            publisher_pems=tuple(adapter.publisher_keys),
            expected_digest=adapter.expected_digest or None,
            checked=adapter.checked,
            attestor_authority_pem=adapter.attestor_authority or None,
        )
    except ValidationError as error:
        raise InvalidInputError(explain(error)) from None


def adapter_status(status: dict[str, Any]) -> pb2.AdapterStatus:
    """One adapter of `tensafe_status`."""
    return pb2.AdapterStatus(
        name=status["name"],
        digest=status["digest"],
        coprocessor_evidence_kind=status["coprocessor_evidence_kind"],
        calls=status.get("calls", 0),
        tokens=status.get("tokens", 0),
        bytes_up=status.get("bytes_up", 0),
        bytes_down=status.get("bytes_down", 0),
        encrypt_seconds=status.get("encrypt_seconds", 0.0),
        wait_seconds=status.get("wait_seconds", 0.0),
        evaluate_seconds=status.get("evaluate_seconds", 0.0),
        decrypt_seconds=status.get("decrypt_seconds", 0.0),
        failed_calls=status.get("failures", 0),
        rotations=status.get("rotations", 0),
        evaluation_key_bytes=status.get("evaluation_key_bytes", 0),
    )
