"""Small random models of every family, as real Hugging Face directories."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # with the default all tokens are alike and a broken cache passes
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")


def make_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of a family in fp32; norms and biases are random too."""
    torch.manual_seed(seed)
    shape = COMMON | overrides
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        match family:
            case "llama":
                model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**shape))
            case "llama3":
                model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=LLAMA3_ROPE))
            case "mistral":
                model = MistralForCausalLM(MistralConfig(**shape, sliding_window=None))
            case "qwen2":
                model = Qwen2ForCausalLM(Qwen2Config(**shape))
            case "qwen3":
                model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=32, tie_word_embeddings=True))
            case _:
                raise ValueError(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += torch.randn_like(parameter) * 0.2
    return model.eval()


def quantised(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 values and the fp32 scale of each row, by torch."""
    peaks = matrix.float().abs().amax(dim=1)
    scales = torch.where(peaks == 0, torch.ones_like(peaks), peaks / 448)
    return (matrix.float() / scales[:, None]).to(torch.float8_e4m3fn), scales


@torch.no_grad()
def fake_quantise(model: PreTrainedModel) -> PreTrainedModel:
    """Gives the matrices of all layers, in place, the values that fp8 leaves of them."""
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            values, scales = quantised(parameter)
            parameter.copy_(values.float() * scales[:, None])
    return model


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Writes config.json and safetensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return directory


def prompts(count: int, longest: int, seed: int = 1) -> list[list[int]]:
    """Random token ids of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]


_known: WeakKeyDictionary[PreTrainedModel, dict[tuple[int, ...], list[int]]] = WeakKeyDictionary()
"""What `reference` has been told."""


def reference(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of transformers, which are asked once: the variants of a test ask the same."""
    known = _known.setdefault(model, {})
    tokens = known.get(tuple(prompt), [])
    if len(tokens) < num_tokens:
        tokens = known[tuple(prompt)] = _generate(model, prompt, num_tokens)
    return tokens[:num_tokens]


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    generated = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return generated[0, len(prompt) :].tolist()
