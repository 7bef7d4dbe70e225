"""The one mapping between TenSafe's errors, gRPC status codes and HTTP status codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from tensorguard import errors
from tensorguard.errors import TenSafeError

REASON_KEY = "tensafe-reason"
_LONGEST_MESSAGE = 1000  # gRPC trailers are limited to 8 KiB
_GENERIC = "internal error; the service's log has the details under this request id"


@dataclass(frozen=True, slots=True)
class Status:
    """What an error becomes on the wire."""

    code: grpc.StatusCode
    http: int
    retry_after: int | None = None
    """Seconds after which asking again may help, for HTTP's Retry-After; None where waiting alone does not."""


# A class that is not listed has the status of its nearest listed base.
_STATUS: dict[type[TenSafeError], Status] = {
    TenSafeError: Status(grpc.StatusCode.INTERNAL, 500),
    errors.ConfigurationError: Status(grpc.StatusCode.FAILED_PRECONDITION, 500),
    errors.InvalidInputError: Status(grpc.StatusCode.INVALID_ARGUMENT, 400),
    errors.UnsupportedAdapterError: Status(grpc.StatusCode.FAILED_PRECONDITION, 400),
    errors.MissingWeightsError: Status(grpc.StatusCode.FAILED_PRECONDITION, 400),
    errors.PackageError: Status(grpc.StatusCode.FAILED_PRECONDITION, 400),
    errors.EvidenceError: Status(grpc.StatusCode.PERMISSION_DENIED, 403),
    errors.TokenError: Status(grpc.StatusCode.UNAUTHENTICATED, 401),
    errors.PolicyError: Status(grpc.StatusCode.FAILED_PRECONDITION, 500),
    errors.AuthenticationError: Status(grpc.StatusCode.UNAUTHENTICATED, 401),
    errors.PermissionDeniedError: Status(grpc.StatusCode.PERMISSION_DENIED, 403),
    errors.RevokedError: Status(grpc.StatusCode.PERMISSION_DENIED, 403),
    errors.RateLimitedError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, retry_after=2),
    errors.NotFoundError: Status(grpc.StatusCode.NOT_FOUND, 404),
    errors.UnavailableError: Status(grpc.StatusCode.UNAVAILABLE, 503, retry_after=2),
    errors.LeaseExpiredError: Status(grpc.StatusCode.FAILED_PRECONDITION, 503, retry_after=30),
    errors.BudgetExhaustedError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    errors.AbortedError: Status(grpc.StatusCode.CANCELLED, 499),
    # Not UNAVAILABLE: gRPC's and proxies' automatic retries must not repeat a failed evaluation.
    errors.DeltaUnavailableError: Status(grpc.StatusCode.ABORTED, 503, retry_after=2),
}

# For peers that sent no reason: proxies, gRPC's own failures.
_BY_CODE: dict[grpc.StatusCode, type[TenSafeError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.UnavailableError,
    grpc.StatusCode.CANCELLED: errors.UnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInputError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.InvalidInputError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.ConfigurationError,
}


def _all_errors(base: type[TenSafeError] = TenSafeError) -> dict[str, type[TenSafeError]]:
    found = {} if base is TenSafeError else {base.reason: base}
    for child in base.__subclasses__():
        # Only this project's published reasons: a subclass elsewhere may not take one over.
        if child.__module__ == errors.__name__:
            found.update(_all_errors(child))
    return found


_BY_REASON = _all_errors()


def status_of(error: TenSafeError | type[TenSafeError]) -> Status:
    """The status of an error or error class: its own entry, or that of its nearest base."""
    kind = error if isinstance(error, type) else type(error)
    return next(_STATUS[base] for base in kind.__mro__ if base in _STATUS)


def http_status(error: TenSafeError) -> int:
    """HTTP status code for an error (used by the gateway)."""
    return status_of(error).http


def public_error(error: BaseException) -> TenSafeError:
    """What a caller may be told: a TenSafe error as it is, anything else as a generic internal error."""
    if isinstance(error, TenSafeError) and not isinstance(error, errors.InternalError):
        return error
    return errors.InternalError(_GENERIC)


def wire_form(error: TenSafeError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """(code, message, trailing metadata) to abort a call with."""
    return status_of(error).code, error.message[:_LONGEST_MESSAGE], ((REASON_KEY, error.reason),)


def error_of(reason: str, message: str) -> TenSafeError | None:
    """The error with this reason code, as it was raised in another process; None for a reason nobody published."""
    kind = _BY_REASON.get(reason)
    return None if kind is None else kind(message)


def from_rpc_error(error: grpc.RpcError, endpoint: str = "") -> TenSafeError:
    """The TenSafe error behind a failed call, restored from its reason, else judged by its status code.

    `endpoint` is named in the message where the service could not be reached.
    """
    code: grpc.StatusCode | None = error.code() if hasattr(error, "code") else None
    message: str = (error.details() or "") if hasattr(error, "details") else ""
    trailing: Any = (error.trailing_metadata() or ()) if hasattr(error, "trailing_metadata") else ()
    reason = next((value for key, value in trailing if key == REASON_KEY), None)
    if isinstance(reason, str) and (restored := error_of(reason, message)) is not None:
        return restored
    kind = _BY_CODE.get(code, errors.InternalError) if code is not None else errors.InternalError
    label = code.name if code is not None else "unknown status"
    where = f"{endpoint}: " if endpoint else ""
    advice = ": is it running, is the address right?" if endpoint and kind is errors.UnavailableError else ""
    return kind(f"{where}{message or 'the call failed'} ({label}){advice}")
