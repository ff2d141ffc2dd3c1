"""Directories of models with real shapes and no weights, for `load_format: dummy`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTEXT = 8192

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "rehearsal": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "cpu-30m": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 16000,
        "tie_word_embeddings": True,
    },
    "cpu-110m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
}


def write_shape(name: str, folder: Path) -> Path:
    """config.json, and a byte-level tokenizer, as Llama 3 has it, in which every id has a text of its own."""
    directory = folder / name
    directory.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name] | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(config["vocab_size"], directory)
    return directory


def write_tokenizer(num_tokens: int, directory: Path) -> None:
    """ASCII's characters, then words with a space before them: no token is a part of a character.

    Other characters of a text are left out.
    """
    decoder = decoders.ByteLevel()
    ascii_bytes = sorted(c for c in pre_tokenizers.ByteLevel.alphabet() if decoder.decode([c]).isascii())
    texts = [*ascii_bytes, *(f"\u0120w{i}" for i in range(len(ascii_bytes), num_tokens))]
    vocabulary = {text: i for i, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    words = pre_tokenizers.Split(Regex(r" ?\S+"), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.decoder = decoder
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
