"""The coprocessor: opened adapters, evaluation on ciphertexts, token metering. No torch, no vLLM."""
