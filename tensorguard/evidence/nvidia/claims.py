"""What an authentic report of a GPU says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuClaims:
    """Of one GPU: everything a `GpuPolicy` may ask."""

    nonce: bytes
    """What the GPU was challenged with, 32 bytes."""
    device_id: str
    """Serial number of the GPU's identity certificate, whole bytes in lower-case hex: burnt in, the same under every
    firmware."""
    model: str
    """Common name of that certificate, such as `GH100 A01 GSP BROM`."""
    driver_version: str
    vbios_version: str
    """As NVIDIA writes it, such as `96.00.A5.00.01`."""
    measurements: Mapping[str, str]
    """Block index (decimal) and value, lower-case hex."""
