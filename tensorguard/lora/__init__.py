"""LoRA adapters: reading PEFT folders, factoring them for the protocol, rounding them to integers.

The algebra is described in docs/protocol.md; nothing here knows about encryption.
"""

from tensorguard.lora.adapter import LoraAdapter, LoraModule
from tensorguard.lora.factorisation import FactoredProjection, factor
from tensorguard.lora.groups import GROUPS, Mode, ProjectionInfo, RoundedGroup, build_group, build_groups

__all__ = [
    "GROUPS",
    "FactoredProjection",
    "LoraAdapter",
    "LoraModule",
    "Mode",
    "ProjectionInfo",
    "RoundedGroup",
    "build_group",
    "build_groups",
    "factor",
]
