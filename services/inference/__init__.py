"""The inference service: vLLM with HE-LoRA hooks, behind gRPC."""
