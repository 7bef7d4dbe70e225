"""OpenAI's JSON around the parts that vLLM does not make: errors, the model list, and the look at "model"."""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from tensorguard.errors import InvalidInputError
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2

# Official SDKs retry by status; `type` tells people who is to act.
_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


def error_type(status: int) -> str:
    """OpenAI's `type` for an HTTP status."""
    if status in _TYPES:
        return _TYPES[HTTPStatus(status)]
    return "invalid_request_error" if status < 500 else "server_error"


def error_object(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error body."""
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": code}}


def requested_model(body: bytes) -> str:
    """Return the "model" of a request body, which is otherwise forwarded untouched.

    Raises InvalidInputError unless the body is one UTF-8 JSON object with exactly one "model" string: a body
    that two parsers could read differently must not pass the gateway's check of model names.
    """
    try:
        document = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise InvalidInputError("The request body is not UTF-8.") from error
    except RecursionError as error:
        raise InvalidInputError("The request body is nested too deeply.") from error
    except ValueError as error:
        raise InvalidInputError(f"We could not parse the JSON body of your request: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInputError("The request body must be a JSON object.")
    model = document.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidInputError('You must provide a "model" name (a string); GET /v1/models lists them.')
    return model


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def model_object(model: inference_pb2.Model) -> dict[str, Any]:
    """OpenAI's model object. Fields beyond OpenAI's are vLLM's, and "tensafe" for our own."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "tensafe",
        "root": model.parent or model.name,
        "parent": model.parent or None,
        "max_model_len": model.max_model_length or None,
        "tensafe": {
            "adapter_digest": model.adapter_digest or None,
            "adapter_sequence": model.adapter_sequence if model.adapter_digest else None,
            "answered_by_adapter": model.answered_by_adapter,
        },
    }


def model_list(models: Iterable[inference_pb2.Model]) -> dict[str, Any]:
    """OpenAI's list of models."""
    return {"object": "list", "data": [model_object(model) for model in models]}
