"""The section `nitro` of a policy."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from tensorguard.evidence.strict import Strict

InstanceId = Annotated[str, StringConstraints(pattern=r"^i-[0-9a-f]{8,17}$")]


class OptionalClaim(str, Enum):
    """The fields that an enclave may leave out of its document."""

    NONCE = "nonce"
    PUBLIC_KEY = "public_key"
    USER_DATA = "user_data"


class NitroPolicy(Strict):
    """What a Nitro document must have. An attestor asks all three optional fields of a workload, whatever is here.

    Which code, instance, role and image signer are allowed is for the registers of measurement tuples.
    """

    required_claims: Annotated[
        list[Annotated[OptionalClaim, Field(strict=False)]], Field(min_length=1, max_length=len(OptionalClaim))
    ]
    """Optional fields that must be there, for evidence that is appraised without an attestor's exchange."""
    instances: Literal["any"] | Annotated[list[InstanceId], Field(min_length=1, max_length=4096)]
    """EC2 instances whose enclaves are accepted."""
