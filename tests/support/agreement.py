"""Greedy answers of a served engine beside those of unmodified PEFT."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorguard.models.reference import ReferenceModel

LARGEST_GAP = 1e-2
"""Two logits this close may change places with the order of a sum in float32; no others may."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A reference answer: its tokens, and for each the distance to the second choice."""

    token_ids: list[int]
    gaps: list[float]


@dataclass(slots=True)
class Agreement:
    """How many answers were equal, and the firmness of the choices at which the others differed."""

    answers: int = 0
    equal: int = 0
    gaps: list[float] = field(default_factory=list)

    def add(self, answer: Sequence[int], expected: Expected) -> None:
        """Compare one answer, of as many tokens as it has."""
        self.answers += 1
        differing = (
            i for i, token in enumerate(answer) if i >= len(expected.token_ids) or token != expected.token_ids[i]
        )
        first = next(differing, None)
        if first is None:
            self.equal += 1
        else:
            self.gaps.append(expected.gaps[first] if first < len(expected.gaps) else float("inf"))

    @property
    def holds(self) -> bool:
        return self.answers > 0 and all(gap <= LARGEST_GAP for gap in self.gaps)

    def __str__(self) -> str:
        gap = f", logit gap {max(self.gaps):.1e}" if self.gaps else ""
        return f"{self.equal}/{self.answers}{gap}"


def reference_answers(
    model: Path, adapter: Path | None, prompts: Sequence[list[int]], max_tokens: int
) -> list[Expected]:
    """What unmodified transformers and PEFT answer in float32, past end tokens."""
    reference = ReferenceModel(model, adapter)
    answers = (reference.answer({"prompt_token_ids": p}, max_tokens, ignore_eos=True) for p in prompts)
    return [Expected(answer.token_ids, answer.gaps) for answer in answers]


async def greedy(core: Any, adapter: str | None, prompt: list[int], max_tokens: int, **options: Any) -> list[int]:
    """The tokens one request gets."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **options,
    )
    async for output in core.route(adapter).generate({"prompt_token_ids": prompt}, sampling, uuid.uuid4().hex):
        tokens = list(output.outputs[0].token_ids)
    return tokens


async def greedy_all(core: Any, requests: Sequence[tuple[str | None, list[int]]], max_tokens: int) -> list[list[int]]:
    """The tokens of (adapter or None for base, prompt) requests that are all in flight together."""
    return list(await asyncio.gather(*(greedy(core, adapter, prompt, max_tokens) for adapter, prompt in requests)))
