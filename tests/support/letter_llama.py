"""A Llama with random weights and a character tokenizer: it starts in seconds and depends on nothing downloaded."""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_letter_llama(folder: Path, *, layers: int = 2, max_position: int = 2048, seed: int = 3) -> Path:
    """Write the model in float32; one token is one character, and no answer ends by itself. Returns `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = character_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,  # of 32 channels, the fewest that vLLM's attention on a CPU takes
        num_key_value_heads=2,
        max_position_embeddings=max_position,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        # Large enough that layers matter and greedy choices are firm.
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():  # the end token is never the likeliest
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def character_tokenizer():  # type: ignore[no-untyped-def]
    """A token for every printable ASCII character and the newline, and an end token; with a chat template."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(characters)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
