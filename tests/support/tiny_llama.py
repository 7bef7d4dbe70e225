"""A small Llama with random weights and a byte tokenizer: everything vLLM, transformers and PEFT need of a model."""

from __future__ import annotations

from pathlib import Path


def write_tiny_llama(folder: Path, *, layers: int = 3, seed: int = 0) -> Path:
    """Write a model of 4 heads, 2 KV heads (so up to 2 tensor-parallel ranks) and 2048 positions; returns `folder`.

    Weights are larger than a fresh model's, so that greedy choices are firm and depend on the whole prompt.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(["<end>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=320,
            max_position_embeddings=2048,
            initializer_range=0.15,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    return folder
