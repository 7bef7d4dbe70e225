"""Evidence of NVIDIA GPUs in confidential computing mode: a further claim about a host beside its TEE's."""
