"""vLLM with HE-LoRA: private adapters computed on ciphertexts inside vLLM's linear layers."""

from tensorguard.backends.vllm.config import TenSafeVLLMConfig
from tensorguard.backends.vllm.engine import TenSafeAsyncEngine

__all__ = ["TenSafeAsyncEngine", "TenSafeVLLMConfig"]
