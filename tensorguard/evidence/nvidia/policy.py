"""The section `gpu` of a role in a policy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from tensorguard.evidence.strict import Strict

MAX_GPUS = 16
_LIST = Field(min_length=1, max_length=256)
Model = Annotated[str, StringConstraints(min_length=1, max_length=64)]
DriverVersion = Annotated[str, StringConstraints(pattern=r"^[0-9]+(?:\.[0-9]+){1,3}$", max_length=32)]
VbiosVersion = Annotated[str, StringConstraints(pattern=r"^[0-9A-F]{2}(?:\.[0-9A-F]{2}){4}$")]
DeviceId = Annotated[str, StringConstraints(pattern=r"^(?:[0-9a-f]{2}){1,20}$")]


class GpuPolicy(Strict):
    """What the GPUs of an inference host must be; every one of them. Nothing here has a default."""

    count: Annotated[int, Field(ge=1, le=MAX_GPUS)]
    """Exactly so many GPUs."""
    models: Annotated[list[Model], _LIST]
    """Common names of GPUs' identity certificates, such as `GH100 A01 GSP BROM`."""
    driver_versions: Annotated[list[DriverVersion], _LIST]
    vbios_versions: Annotated[list[VbiosVersion], _LIST]
    devices: Literal["any"] | Annotated[list[DeviceId], _LIST]
    """Serial numbers of identity certificates, whole bytes in hex."""
