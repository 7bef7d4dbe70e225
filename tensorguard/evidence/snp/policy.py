"""The section `snp` of a policy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from tensorguard.evidence.snp.claims import SigningKey
from tensorguard.evidence.snp.product import Product
from tensorguard.evidence.strict import Strict

Byte = Annotated[int, Field(ge=0, le=255)]
ChipId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
CspId = Annotated[str, StringConstraints(min_length=1, max_length=256)]
GuestFeature = Literal[
    "single_socket", "memory_aes_256_xts", "rapl_disabled", "ciphertext_hiding", "page_swap_disabled"
]
PlatformFeature = Literal["tsme", "ecc", "rapl_disabled", "ciphertext_hiding", "alias_check"]


class TcbFloor(Strict):
    """Lowest security versions, component by component: more of one never makes up for less of another."""

    bootloader: Byte
    tee: Byte
    snp: Byte
    microcode: Byte
    fmc: Byte | None = None
    """Turin has it, and must be given it; the others have none."""


class TcbFloors(Strict):
    """What each of the four versions in a report must reach."""

    reported: TcbFloor
    """Version that the signing key is derived from."""
    current: TcbFloor
    """Version that runs."""
    committed: TcbFloor
    """Version that the machine cannot be rolled back below."""
    launch: TcbFloor
    """Version when the guest was launched."""


class MinimumAbi(Strict):
    """Lowest firmware interface that the guest's own policy may name."""

    major: Byte
    minor: Byte


class SnpPolicy(Strict):
    """What an SEV-SNP guest and its machine must be. A field without a default is one that a default would weaken."""

    tcb_floors: Annotated[dict[Annotated[Product, Field(strict=False)], TcbFloors], Field(min_length=1)]
    """By processor line. A line that is not listed is refused."""
    signing_keys: Annotated[list[Annotated[SigningKey, Field(strict=False)]], Field(min_length=1, max_length=2)]
    """Whose keys may sign: `vcek` for a chip's own, `vlek` for a cloud provider's."""
    csp_ids: Annotated[list[CspId], Field(min_length=1, max_length=64)] | None = None
    """Providers whose VLEK is accepted, as its certificate names them. Needed with `vlek`, and only then."""
    vmpls: Annotated[list[Annotated[int, Field(ge=0, le=3)]], Field(min_length=1, max_length=4)]
    """Privilege levels that may ask for evidence. 0 unless the guest runs a paravisor."""
    minimum_abi: MinimumAbi
    minimum_guest_svn: Annotated[int, Field(ge=0, le=2**32 - 1)]
    """Security version that the guest's owner gave it in the ID block; 0 where there is none."""
    allow_smt: bool
    allow_migration_agent: bool
    allow_cxl: bool
    required_guest_policy: Annotated[list[GuestFeature], Field(max_length=16)]
    """What the guest must demand of every machine it runs on. May be empty."""
    required_platform: Annotated[list[PlatformFeature], Field(max_length=16)]
    """What the machine must say about itself. May be empty. `alias_check` is AMD's answer to BadRAM (AMD-SB-3015)."""
    chip_ids: Literal["any"] | Annotated[list[ChipId], Field(min_length=1, max_length=4096)]
    """Chips that are accepted: 64 bytes as in a report (Turin: 8 bytes and zeros)."""
    revoked_chip_ids: Annotated[list[ChipId], Field(max_length=4096)]
    """Chips that are refused. May be empty. If it is not, a report whose chip id is masked is refused as well."""
    require_crl: bool
    """Whether AMD's revocation list must be supplied. One that is supplied is always checked."""

    @model_validator(mode="after")
    def _floors_fit_the_products(self) -> SnpPolicy:
        for product, floors in self.tcb_floors.items():
            for name, floor in (
                ("reported", floors.reported),
                ("current", floors.current),
                ("committed", floors.committed),
                ("launch", floors.launch),
            ):
                if (floor.fmc is not None) != (product is Product.TURIN):
                    raise ValueError(f"tcb_floors.{product.value}.{name}: Turin needs fmc, and only Turin has it")
        return self

    @model_validator(mode="after")
    def _providers_are_those_of_vlek(self) -> SnpPolicy:
        if (self.csp_ids is not None) != (SigningKey.VLEK in self.signing_keys):
            raise ValueError("csp_ids goes with vlek in signing_keys: name the providers, or leave both out")
        return self
