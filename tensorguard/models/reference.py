r"""The plaintext reference: unmodified transformers and PEFT, float32, greedy, in a process of its own.

What HE-LoRA serves is compared with this, token by token. It shares no code with the encrypted path: the
adapter is the original PEFT folder, and generation is `transformers.generate` with its KV cache. Run it as

    python -m tensorguard.models.reference --model DIR [--adapter DIR] --prompts FILE \
        --max-tokens N --json OUT

The prompts file is a JSON list of objects with one of `messages` (a chat), `prompt` (text) and
`prompt_token_ids`. The output is a JSON list, in the same order, of `prompt_token_ids`, `token_ids` (an end
token included), `text` and `gaps`: for each step the difference of the two highest logits, which tells how
firm that choice was.

torch, transformers and peft are imported when the model is loaded, not with this module.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensorguard.errors import ConfigurationError, InvalidInputError, TenSafeError

MAX_PROMPTS_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ReferenceAnswer:
    """A greedy answer. `gaps[i]` is the highest minus the second-highest logit for `token_ids[i]`."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    gaps: list[float]


class ReferenceModel:
    """A base model in float32, with a PEFT adapter if one is given."""

    def __init__(self, model_dir: Path | str, adapter_dir: Path | str | None = None) -> None:
        """Load both. Raises ConfigurationError when a folder or a library is missing."""
        _require_file(Path(model_dir) / "config.json", "--model must name a Hugging Face model folder")
        if adapter_dir is not None:
            _require_file(Path(adapter_dir) / "adapter_config.json", "--adapter must name a PEFT adapter folder")
        try:
            import torch
            import transformers
            from transformers import AutoModelForCausalLM, AutoTokenizer

            if adapter_dir is not None:
                from peft import PeftModel
        except ImportError as error:
            raise ConfigurationError(f"the plaintext reference needs {error.name}: run `make setup`") from None
        transformers.utils.logging.disable_progress_bar()
        self._torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
        self._end_tokens = self.model.generation_config.eos_token_id
        if adapter_dir is not None:
            self.model = PeftModel.from_pretrained(self.model, adapter_dir, local_files_only=True)
        self.model.eval()

    def encode(self, prompt: Mapping[str, Any]) -> list[int]:
        """Token ids of a prompt; messages go through the chat template just as vLLM's server renders them."""
        given = sorted({"messages", "prompt", "prompt_token_ids"} & prompt.keys())
        if len(given) != 1:
            raise InvalidInputError("a prompt has exactly one of messages, prompt, prompt_token_ids")
        if given == ["prompt_token_ids"]:
            return [int(token) for token in prompt["prompt_token_ids"]]
        if given == ["prompt"]:
            return list(self.tokenizer(prompt["prompt"]).input_ids)
        text = self.tokenizer.apply_chat_template(prompt["messages"], add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def answer(self, prompt: Mapping[str, Any], max_tokens: int, ignore_eos: bool = False) -> ReferenceAnswer:
        """Generate greedily up to `max_tokens` tokens; with `ignore_eos`, go on past an end token."""
        from transformers import GenerationConfig

        prompt_token_ids = self.encode(prompt)
        if not prompt_token_ids:
            raise InvalidInputError("a prompt is empty")
        # A configuration of our own, in both places: generate() fills what one lacks from the other, and a
        # model's defaults (temperature, repetition penalty) must not make "greedy" something else.
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=None if ignore_eos else self._end_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.model.generation_config = settings
        base = getattr(self.model, "base_model", self.model)
        getattr(base, "model", base).generation_config = settings
        inputs = self._torch.tensor([prompt_token_ids])
        with self._torch.no_grad():
            output = self.model.generate(
                input_ids=inputs,
                attention_mask=self._torch.ones_like(inputs),
                generation_config=settings,
                return_dict_in_generate=True,
                output_logits=True,
            )
        token_ids = output.sequences[0, len(prompt_token_ids) :].tolist()
        best = [step[0].float().topk(2).values for step in output.logits]
        return ReferenceAnswer(
            prompt_token_ids=prompt_token_ids,
            token_ids=token_ids,
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            gaps=[float(pair[0] - pair[1]) for pair in best],
        )


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read the prompts file; raises ConfigurationError or InvalidInputError."""
    _require_file(path, "--prompts must name a JSON file")
    if path.stat().st_size > MAX_PROMPTS_BYTES:
        raise InvalidInputError(f"{path} is larger than {MAX_PROMPTS_BYTES} bytes")
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, dict) for prompt in prompts):
        raise InvalidInputError(f"{path} must hold a JSON list of objects")
    return prompts


def answer_all(
    model: ReferenceModel,
    prompts: Sequence[Mapping[str, Any]],
    max_tokens: int,
    ignore_eos: bool = False,
    progress: Callable[[str], None] = lambda _line: None,
) -> list[ReferenceAnswer]:
    """Answer every prompt, one after the other."""
    answers = []
    for number, prompt in enumerate(prompts, 1):
        answers.append(model.answer(prompt, max_tokens, ignore_eos))
        progress(f"plaintext reference: {number} of {len(prompts)} prompts")
    return answers


def _require_file(path: Path, hint: str) -> None:
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist; {hint}")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; the answers go to the --json file, progress to standard error."""
    parser = argparse.ArgumentParser(prog="python -m tensorguard.models.reference", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument("--adapter", type=Path, help="PEFT adapter folder; without it the base model answers")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON list of prompts")
    parser.add_argument("--max-tokens", type=int, required=True, help="tokens per answer")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past end tokens")
    parser.add_argument("--json", type=Path, required=True, help="file to write the answers to")
    options = parser.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    try:
        if options.max_tokens < 1:
            raise ConfigurationError("--max-tokens must be at least 1")
        prompts = read_prompts(options.prompts)
        _report("plaintext reference: loading the model")
        model = ReferenceModel(options.model, options.adapter)
        answers = answer_all(model, prompts, options.max_tokens, options.ignore_eos, _report)
    except TenSafeError as error:
        print(error.line, file=sys.stderr)
        return 1
    options.json.write_text(json.dumps([asdict(answer) for answer in answers]) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
