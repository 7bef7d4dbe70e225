from __future__ import annotations

from typing import Any

import grpc
import pytest

from tensorguard import errors
from tensorguard.errors import TenSafeError
from tensorguard.rpc.status import _BY_REASON, error_of, from_rpc_error, http_status, public_error, status_of, wire_form


class Failed(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str, trailing: Any = ()) -> None:
        self._all = code, details, trailing

    def code(self) -> grpc.StatusCode:
        return self._all[0]

    def details(self) -> str:
        return self._all[1]

    def trailing_metadata(self) -> Any:
        return self._all[2]


def all_errors() -> list[type[TenSafeError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TenSafeError)]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_survives_the_wire(kind: type[TenSafeError]) -> None:
    code, message, trailing = wire_form(kind("what to change"))
    restored = from_rpc_error(Failed(code, message, trailing))
    assert restored.reason == kind.reason and restored.message == "what to change"
    assert 400 <= http_status(restored) < 600 and code is not grpc.StatusCode.OK


def test_reasons_are_unique() -> None:
    reasons = [kind.reason for kind in all_errors() if kind is not TenSafeError]
    assert len(reasons) == len(set(reasons)) == len(_BY_REASON)


@pytest.mark.parametrize("kind", [kind for kind in all_errors() if kind is not TenSafeError])
def test_every_error_is_restored_from_its_reason(kind: type[TenSafeError]) -> None:
    # Not as its base: `public_error` tells the message of a bare TenSafeError, and hides an InternalError's.
    assert type(error_of(kind.reason, "x")) is kind


def test_a_foreign_reason_restores_nothing() -> None:
    assert error_of("nonsense", "x") is None


def test_subclass_has_its_base_status() -> None:
    assert status_of(errors.PackageTamperedError) == status_of(errors.PackageError)
    assert status_of(errors.TokenExpiredError).http == 401


def test_delta_failures_are_never_retried_by_grpc() -> None:
    assert status_of(errors.DeltaUnavailableError).code is not grpc.StatusCode.UNAVAILABLE


def test_unknown_reason_falls_back_to_the_code() -> None:
    error = from_rpc_error(Failed(grpc.StatusCode.NOT_FOUND, "x", (("tensafe-reason", "nonsense"),)))
    assert type(error) is errors.NotFoundError


def test_unreachable_names_the_endpoint() -> None:
    error = from_rpc_error(Failed(grpc.StatusCode.UNAVAILABLE, "connection refused"), "attestor 10.0.0.1:1")
    assert type(error) is errors.UnavailableError and "attestor 10.0.0.1:1" in error.message


def test_unexpected_exceptions_become_generic() -> None:
    assert "secret" not in public_error(ValueError("secret")).message
    assert "secret" not in public_error(errors.InternalError("secret")).message


def test_long_messages_are_cut() -> None:
    assert len(wire_form(errors.InvalidInputError("x" * 10_000))[1]) == 1000
