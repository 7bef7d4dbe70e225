"""TenSafe: private LoRA adapters for vLLM, computed on ciphertexts."""

__version__ = "0.1.0"
