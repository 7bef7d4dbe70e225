"""Conditions on Nitro claims: one small check each, composed from a policy's section and for an exchange."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from tensorguard.errors import EvidenceRefusedError
from tensorguard.evidence.checks import AppraisalCheck, ExpectedNonce
from tensorguard.evidence.claims import Claims
from tensorguard.evidence.nitro.claims import NitroClaims
from tensorguard.evidence.nitro.policy import NitroPolicy, OptionalClaim


def nitro_checks(policy: NitroPolicy) -> list[AppraisalCheck]:
    """The checks of a policy's section."""
    return [
        RequiredClaims(policy.required_claims),
        AllowedInstance(None if policy.instances == "any" else policy.instances),
    ]


def nitro_exchange_checks(nonce: bytes, public_key: bytes) -> list[AppraisalCheck]:
    """What ties a document to an attestor's exchange, beside the report data in `user_data`.

    A key is released only to a document that has all three optional fields: `public_key` is the DER
    SubjectPublicKeyInfo of the workload's signing key.
    """
    return [RequiredClaims(tuple(OptionalClaim)), ExpectedNonce(nonce), ExpectedPublicKey(public_key)]


def _details(claims: Claims) -> NitroClaims:
    if not isinstance(claims.details, NitroClaims):
        raise EvidenceRefusedError("the claims are not of a Nitro document", "malformed")
    return claims.details


@dataclass(frozen=True, slots=True)
class RequiredClaims:
    """Optional fields are there, and not empty."""

    names: Sequence[OptionalClaim]

    def verify(self, claims: Claims) -> None:
        details = _details(claims)
        values = {
            OptionalClaim.NONCE: claims.nonce,
            OptionalClaim.PUBLIC_KEY: details.public_key,
            OptionalClaim.USER_DATA: details.user_data,
        }
        for name in self.names:
            if not values[name]:
                raise EvidenceRefusedError(
                    f"the document has no {name.value}; give it to the security module with the request",
                    f"{name.value}_missing",
                )


@dataclass(frozen=True, slots=True)
class ExpectedPublicKey:
    """The document names this key."""

    public_key: bytes

    def verify(self, claims: Claims) -> None:
        if not hmac.compare_digest(_details(claims).public_key or b"", self.public_key):
            raise EvidenceRefusedError("the document is for another public key", "public_key_mismatch")


@dataclass(frozen=True, slots=True)
class AllowedInstance:
    """The enclave runs on one of these EC2 instances. None: any."""

    instances: Sequence[str] | None

    def verify(self, claims: Claims) -> None:
        instance = _details(claims).instance_id
        if self.instances is not None and instance not in self.instances:
            raise EvidenceRefusedError(
                f"instance {instance} is not in the policy's nitro.instances", "instance_not_allowed"
            )
