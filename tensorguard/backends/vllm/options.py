"""Options of the base model's engine, as one declaration for the Python API, the server command and the service.

They have vLLM's names and vLLM's meaning; None leaves the choice to vLLM. What cannot work with HE-LoRA, or not
together, is refused here by name, before anything is started. This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tensorguard.errors import ConfigurationError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$"

SpeculativeMethod = Literal["ngram", "draft_model"]


class EngineOptions(BaseModel):
    """Options of the base model's engine, named as vLLM names them."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    model: str = Field(min_length=1)
    """folder of the base model, or its name in the Hugging Face cache or on the hub"""
    served_model_name: str | None = Field(default=None, pattern=NAME_PATTERN)
    """name users put into "model" for the base model (default: `model`; of a folder, its name)"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """type of weights and activations; deltas are added in float32 whatever it is"""
    quantization: str | None = Field(default=None, pattern=r"^[a-z0-9_-]{1,64}$")
    """how the base model's weights are quantised; adapters stay exact, but must be packed for this model folder"""
    max_model_len: int | None = Field(default=None, ge=16)
    """longest prompt and answer together, in tokens (default: the model's)"""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """share of the GPU's memory that vLLM may take"""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """size of the KV cache (default: what fits on a GPU, 1 on a CPU)"""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """most requests in one step"""
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """most tokens in one step; longer prompts are computed in several steps"""
    enable_chunked_prefill: bool | None = None
    """share steps between parts of long prompts and generation"""
    enable_prefix_caching: bool | None = None
    """reuse what equal beginnings of prompts have in common, within one release of one adapter"""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """number of processes (GPUs) the model is divided among"""
    seed: int = 0
    """seed of sampling"""
    enforce_eager: bool = True
    """neither compile the model nor capture CUDA graphs"""
    speculative_method: SpeculativeMethod | None = None
    """how tokens are guessed ahead: "ngram" looks in the prompt, "draft_model" asks `speculative_model` (default:
    "draft_model" if that is given)"""
    speculative_model: str | None = Field(default=None, min_length=1)
    """draft model, with the base model's vocabulary; it runs without adapters, and may be the base model itself"""
    num_speculative_tokens: int | None = Field(default=None, ge=1)
    """tokens guessed ahead; one more row than these is encrypted for each request and step"""
    prompt_lookup_max: int | None = Field(default=None, ge=1)
    """longest sequence of tokens that "ngram" looks for"""
    prompt_lookup_min: int | None = Field(default=None, ge=1)
    """shortest sequence of tokens that "ngram" looks for"""
    trust_remote_code: bool = False
    """must stay off: code from a model's folder would run where keys and activations are, unattested"""

    @property
    def base_name(self) -> str:
        """The name under which the base model is served."""
        if self.served_model_name is not None:
            return self.served_model_name
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    @property
    def speculation(self) -> SpeculativeMethod | None:
        """The method of speculative decoding, None for none."""
        if self.speculative_method is None and self.speculative_model is not None:
            return "draft_model"
        return self.speculative_method


def check_engine_options(options: EngineOptions) -> None:
    """Refuse, by name, what cannot work. Raises ConfigurationError."""
    if options.trust_remote_code:
        raise ConfigurationError(
            "trust_remote_code=True is refused: the model folder's code would run in the attested process that holds "
            "keys and activations; use a model that vLLM implements itself"
        )
    _check_steps(options)
    _check_speculation(options)


def _check_steps(options: EngineOptions) -> None:
    tokens = options.max_num_batched_tokens
    if tokens is None:
        return
    if options.max_num_seqs is not None and tokens < options.max_num_seqs:
        raise ConfigurationError(
            f"max_num_batched_tokens={tokens} is less than max_num_seqs={options.max_num_seqs}: every request needs a "
            "token in each step; raise the first or lower the second"
        )
    if options.enable_chunked_prefill is False and options.max_model_len is not None and tokens < options.max_model_len:
        raise ConfigurationError(
            f"enable_chunked_prefill=False needs max_num_batched_tokens of at least max_model_len="
            f"{options.max_model_len}, not {tokens}: a whole prompt is one step"
        )


def _check_speculation(options: EngineOptions) -> None:
    method = options.speculation
    lookups = [name for name in ("prompt_lookup_max", "prompt_lookup_min") if getattr(options, name) is not None]
    if method is None:
        if given := [*lookups, *(["num_speculative_tokens"] if options.num_speculative_tokens else [])]:
            raise ConfigurationError(
                f"{', '.join(given)} needs speculative_method='ngram', or speculative_model; set one of these"
            )
        return
    if options.num_speculative_tokens is None:
        raise ConfigurationError(
            f"speculative_method={method!r} needs num_speculative_tokens, how many tokens to guess ahead (such as 3)"
        )
    if method == "ngram" and options.speculative_model is not None:
        raise ConfigurationError("speculative_method='ngram' uses no speculative_model; leave one of them out")
    if method == "draft_model" and options.speculative_model is None:
        raise ConfigurationError("speculative_method='draft_model' needs speculative_model")
    if method == "draft_model" and lookups:
        raise ConfigurationError(f"{', '.join(lookups)} needs speculative_method='ngram'")
    low, high = options.prompt_lookup_min, options.prompt_lookup_max
    if low is not None and high is not None and low > high:
        raise ConfigurationError(f"prompt_lookup_min={low} is more than prompt_lookup_max={high}")
