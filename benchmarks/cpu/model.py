"""The benchmark's model: 100M parameters, Llama architecture, random weights in bf16."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32000


def write_model(directory: Path) -> Path:
    """A Hugging Face directory; every token id is a word `w123`, and none ends a text."""
    if (directory / "model.safetensors").exists():
        return directory
    config = LlamaConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        initializer_range=0.05,
        eos_token_id=None,
        bos_token_id=None,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    fast.save_pretrained(directory)
    return directory


def prompt(seed: int, length: int) -> str:
    """Words that differ from prompt to prompt."""
    return " ".join(f"w{(7919 * (seed + 1) + 6151 * i) % VOCABULARY}" for i in range(length))
