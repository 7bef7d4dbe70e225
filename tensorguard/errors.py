"""Every error a user of TenSafe can meet, each with a stable reason code.

The mapping to gRPC and HTTP status lives in `tensorguard.rpc.status`, and only there.
"""

from __future__ import annotations


class TenSafeError(Exception):
    """Base of all errors. The message says what is wrong and what to change; `reason` is for programs."""

    reason = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    @property
    def line(self) -> str:
        """What a command prints on standard error before it exits."""
        return f"error: {self.message} [{self.reason}]"


class ConfigurationError(TenSafeError):
    """An option is unknown, contradictory or names something that is not there."""

    reason = "configuration"


class InvalidInputError(TenSafeError):
    """A request or message is malformed or out of bounds."""

    reason = "invalid_input"


class UnsupportedAdapterError(TenSafeError):
    """The adapter has a rank, module or feature that the zero-rotation contract does not allow."""

    reason = "unsupported_adapter"


class MissingWeightsError(TenSafeError):
    """Weights that the adapter's configuration promises are not in its files."""

    reason = "missing_weights"


class PackageError(TenSafeError):
    """A `.tssp` package cannot be used."""

    reason = "package"


class PackageTamperedError(PackageError):
    """A signature, hash or authentication tag of the package does not verify."""

    reason = "package_tampered"


class PackageKeyError(PackageError):
    """The content key is not the one this package was sealed with."""

    reason = "package_key"


class PackageRollbackError(PackageError):
    """An older release than was opened before, or another one under the same sequence."""

    reason = "package_rollback"


class BaseModelMismatchError(PackageError):
    """The package was made for another base model."""

    reason = "base_model_mismatch"


class PrivacyBoundError(PackageError):
    """The package's weights do not allow the privacy or precision bound that is required."""

    reason = "privacy_bound"


class EvidenceError(TenSafeError):
    """Evidence about a workload cannot be used."""

    reason = "evidence"


class EvidenceRefusedError(EvidenceError):
    """The evidence is malformed, not authentic, or not what the policy allows."""

    reason = "evidence_refused"

    def __init__(self, message: str, detail: str = "malformed") -> None:
        """`detail` is the finer reason, for programs and the audit log."""
        super().__init__(message)
        self.detail = detail


class NonceError(EvidenceError):
    """The nonce is unknown, expired or already used."""

    reason = "nonce"


class TokenError(TenSafeError):
    """An attestation token does not verify or is not valid for this use."""

    reason = "token"


class TokenExpiredError(TokenError):
    """An attestation token is past its expiry."""

    reason = "token_expired"


class PolicyError(TenSafeError):
    """A policy is malformed, has unknown fields or allows nothing."""

    reason = "policy"


class AuthenticationError(TenSafeError):
    """The caller did not prove who it is."""

    reason = "authentication"


class PermissionDeniedError(TenSafeError):
    """The caller is known but may not do this."""

    reason = "permission_denied"


class RevokedError(TenSafeError):
    """What the request rests on (package, key, workload, code or machine) was revoked."""

    reason = "revoked"

    def __init__(self, message: str, detail: str = "revoked") -> None:
        """`detail` says which, for programs and the audit log: `package_revoked` and so on."""
        super().__init__(message)
        self.detail = detail


class RateLimitedError(TenSafeError):
    """The caller, or all callers together, ask too often."""

    reason = "rate_limited"


class NotFoundError(TenSafeError):
    """The thing named does not exist."""

    reason = "not_found"


class UnavailableError(TenSafeError):
    """A service cannot be reached or is not ready."""

    reason = "unavailable"


class LeaseExpiredError(TenSafeError):
    """The lease on a package key is over."""

    reason = "lease_expired"


class BudgetExhaustedError(TenSafeError):
    """The token budget of an adapter release is spent."""

    reason = "budget_exhausted"


class DeltaUnavailableError(TenSafeError):
    """An adapter's delta could not be had. The reason is the same for every cause, so that failures are no oracle."""

    reason = "delta_unavailable"


class AbortedError(TenSafeError):
    """The request was ended early, by its caller's own wish."""

    reason = "aborted"


class InternalError(TenSafeError):
    """Something unexpected; details are in the service's own log."""

    reason = "internal"
