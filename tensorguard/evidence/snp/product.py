"""AMD's processor lines with SEV-SNP, and the versions of firmware that they report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

TCB_BYTES = 8


class Product(str, Enum):
    """A processor line: all of its chips share one root key (ARK)."""

    MILAN = "milan"
    GENOA = "genoa"
    """Also Bergamo and Siena, which have Genoa's root."""
    TURIN = "turin"

    @property
    def label(self) -> str:
        """The name as AMD writes it in certificates."""
        return self.value.capitalize()

    @classmethod
    def from_cpuid(cls, family: int, model: int) -> Product | None:
        """The line of a processor by its CPUID family and model, extended parts included. None if it is in none."""
        if family == 0x19 and model in range(0x10):
            return cls.MILAN
        if family == 0x19 and (model in range(0x10, 0x20) or model in range(0xA0, 0xB0)):
            return cls.GENOA
        if family == 0x1A and model in range(0x20):
            return cls.TURIN
        return None


@dataclass(frozen=True, slots=True)
class TcbVersion:
    """Security versions of the firmware that protects a guest (TCB_VERSION; SEV-SNP ABI 56860, 2.2)."""

    bootloader: int
    tee: int
    """Operating system of the AMD secure processor."""
    snp: int
    microcode: int
    fmc: int | None = None
    """Firmware manager, Turin only."""

    @classmethod
    def from_bytes(cls, raw: bytes, product: Product) -> TcbVersion:
        """The components in the 8 bytes of a report. They stand elsewhere since Turin."""
        if product is Product.TURIN:
            return cls(fmc=raw[0], bootloader=raw[1], tee=raw[2], snp=raw[3], microcode=raw[7])
        return cls(bootloader=raw[0], tee=raw[1], snp=raw[6], microcode=raw[7])
