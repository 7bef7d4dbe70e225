"""What an authentic Nitro document says, beyond the claims of every kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NitroClaims:
    """Everything a `NitroPolicy` may ask, and what ties the document to an exchange."""

    module_id: str
    """Parent instance and enclave, such as `i-0123456789abcdef0-enc0123456789abcdef`."""
    timestamp: int
    """Milliseconds since 1970, by the hypervisor's clock."""
    certificate_expires_at: int
    """Unix seconds: the earliest end of any certificate of the chain."""
    public_key: bytes | None
    user_data: bytes | None

    @property
    def instance_id(self) -> str:
        """The EC2 instance that the enclave runs on, the part of `module_id` before `-enc`."""
        return self.module_id.partition("-enc")[0]
