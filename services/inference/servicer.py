"""`InferenceService`: model names, one OpenAI request at a time, and status."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import structlog

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
from tensorguard.backends.vllm.config import BaseNameAnswers
from tensorguard.backends.vllm.core import EngineCore
from tensorguard.errors import InvalidInputError, TenSafeError, UnavailableError
from tensorguard.rpc.authorisation import PUBLIC, Rule, bearer
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2 as pb2

log = structlog.get_logger(__name__)

STATUS_SECONDS = 2.0
NOT_FOUND = 404


def rules(secret: str | None) -> dict[str, Rule]:
    """Who may call: whoever reaches the port, or only callers that know `secret`."""
    rule = PUBLIC if secret is None else bearer(secret)
    return {"ListModels": rule, "Complete": rule, "GetStatus": rule}


class InferenceServicer:
    """Answers for one engine. The base model and each adapter have a name of their own."""

    def __init__(
        self, core: EngineCore, *, base_name_answers: BaseNameAnswers = "base", tool_parser: str | None = None
    ) -> None:
        self._core = core
        self._created = int(time.time())
        self._base_name = core.options.base_name
        base_adapter = next(iter(core.adapters)) if base_name_answers == "adapter" else None
        renderer = make_renderer(core.route(None), tool_parser)
        names = {self._base_name: base_adapter, **{name: name for name in core.adapters}}
        self._models = {
            name: ModelAnswers(name, core.route(adapter), renderer, tool_parser) for name, adapter in names.items()
        }
        self._status: dict[str, Any] | None = None
        self._asking: asyncio.Task[dict[str, Any]] | None = None
        if base_adapter is not None:
            log.info("base_name_answered_by_adapter", name=self._base_name, adapter=base_adapter)

    async def ListModels(self, request: pb2.ListModelsRequest, context: Any) -> pb2.ListModelsResponse:  # noqa: N802
        return pb2.ListModelsResponse(models=[self._describe(model) for model in self._models.values()])

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
        answer = await self._answer(request)
        yield pb2.CompleteResponse(head=pb2.ResponseHead(status=int(answer.status), content_type=answer.content_type))
        async with aclosing(answer.body) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield pb2.CompleteResponse(body=piece)

    async def _answer(self, request: pb2.CompleteRequest) -> Answer:
        try:
            document = parse_body(request.body, request.request_id)
        except InvalidInputError as error:
            return await error_answer(error)
        model = self._models.get(document["model"])
        if model is None:
            message = f"The model `{document['model']}` does not exist; there are: {', '.join(self._models)}."
            return await json_answer(NOT_FOUND, error_document(NOT_FOUND, message, "model_not_found", "model"))
        if request.endpoint == pb2.ENDPOINT_CHAT_COMPLETIONS:
            return await model.chat(document)
        if request.endpoint == pb2.ENDPOINT_COMPLETIONS:
            return await model.completions(document)
        raise InvalidInputError("endpoint must be ENDPOINT_CHAT_COMPLETIONS or ENDPOINT_COMPLETIONS")

    async def GetStatus(self, request: pb2.GetStatusRequest, context: Any) -> pb2.GetStatusResponse:  # noqa: N802
        status: dict[str, Any] = {"evidence_kind": "", "adapters": []}
        if self._core.adapters:
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
