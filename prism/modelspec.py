"""What a Hugging Face model directory says of its model, as plain values.

Read by every part (the gateway needs context length and end tokens, the packer shapes, the engine all
of it), so it imports no torch and runs no code of the directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism.errors import CheckpointError
from prism.types import Bytes, DType, Quantization

_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_DTYPES = {
    "bfloat16": DType.BF16,
    "float16": DType.F16,
    "float32": DType.F32,
    "bf16": DType.BF16,
    "fp16": DType.F16,
    "fp32": DType.F32,
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary embedding: `kind` is "default", "linear" or "llama3"; other kinds are refused when read."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape of a dense decoder-only model."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeScaling
    max_position: int
    """Longest context in tokens that the model attends over exactly (a sliding window bounds it)."""
    tied_embeddings: bool
    attention_bias: bool
    """q, k and v projections have a bias."""
    output_bias: bool
    """The attention's output projection has one."""
    qk_norm: bool
    dtype: DType
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, float | int]
    """temperature, top_p, top_k, min_p, repetition_penalty where generation_config.json sets them."""
    quantization: Quantization = "none"
    """Of the layers' matrices; everything else is of `dtype`."""

    @property
    def matrix_dtype(self) -> DType:
        """Number format of the layers' matrices."""
        return DType.F8 if self.quantization == "fp8" else self.dtype

    @property
    def kv_bytes_per_token(self) -> Bytes:
        """Bytes of keys and values of all layers for one token."""
        heads = self.num_layers * 2 * self.num_kv_heads
        return Bytes(heads * self.head_dim * self.dtype.itemsize)

    @property
    def position_bytes(self) -> Bytes:
        """Bytes of a position's cosines and sines, in fp32."""
        return Bytes(4 * self.head_dim)


class _Fields:
    """config.json with errors that name the file and the field."""

    def __init__(self, path: Path) -> None:
        self.file = str(path)
        self.values = _read_json(path)

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(message, file=self.file)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.fail(f"{name} must be a positive integer, not {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        return _number(self, self.values, name, default)


def _number(fields: _Fields, values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise fields.fail(f"{name} must be a positive number, not {value!r}")
    return float(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError("no such file", file=str(path)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not readable as JSON: {error}", file=str(path)) from None
    if not isinstance(value, dict):
        raise CheckpointError("must hold a JSON object", file=str(path))
    return value


def read_spec(
    directory: str | Path,
    *,
    dtype: str = "auto",
    max_len: int | None = None,
    quantization: Quantization = "none",
) -> ModelSpec:
    """The spec of a model directory.

    `dtype` is "auto" (the checkpoint's own), "bf16", "fp16" or "fp32"; `max_len` lowers the context length.
    Raises `CheckpointError` naming file and field for anything missing, malformed or unsupported.
    """
    fields = _Fields(Path(directory) / "config.json")
    family = _family(fields)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.fail(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if fields.values.get("head_dim") is None and hidden % heads:
        raise fields.fail(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    _refuse_unsupported(fields)
    bias = bool(fields.values.get("attention_bias", False))
    eos, sampling = _generation(fields)
    vocab_size = fields.integer("vocab_size")
    return ModelSpec(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.integer("head_dim", hidden // heads),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        max_position=_context(fields, family, max_len),
        tied_embeddings=bool(fields.values.get("tie_word_embeddings", False)),
        attention_bias=bias or family == "qwen2",
        output_bias=bias and family != "qwen2",
        qk_norm=family == "qwen3",
        dtype=_dtype(fields, dtype),
        eos_token_ids=tuple(token for token in eos if 0 <= token < vocab_size),  # others are never drawn
        default_sampling=sampling,
        quantization=quantization,
    )


def _family(fields: _Fields) -> str:
    names = fields.values.get("architectures") or []
    for name in names:
        if name in _FAMILIES:
            return _FAMILIES[name]
    raise fields.fail(f"architectures {names!r} not supported; known: {', '.join(sorted(_FAMILIES))}")


def _refuse_unsupported(fields: _Fields) -> None:
    if fields.values.get("hidden_act", "silu") != "silu":
        raise fields.fail(f"hidden_act {fields.values['hidden_act']!r} not supported; known: silu")
    if fields.values.get("quantization_config") is not None:
        raise fields.fail("quantization_config: quantised checkpoints are not supported")
    if fields.values.get("mlp_bias"):
        raise fields.fail("mlp_bias is not supported")


def _dtype(fields: _Fields, asked: str) -> DType:
    if asked != "auto":
        return _DTYPES[asked]
    name = fields.values.get("dtype") or fields.values.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise fields.fail(f"dtype {name!r} not supported; known: bfloat16, float16, float32")
    return _DTYPES[name]


def _context(fields: _Fields, family: str, max_len: int | None) -> int:
    length = fields.integer("max_position_embeddings", 2048)
    window = fields.values.get("sliding_window")
    windowed = family == "mistral" or bool(fields.values.get("use_sliding_window", False))
    if windowed and isinstance(window, int) and window > 0:
        length = min(length, window)  # full attention equals windowed attention up to here
    return length if max_len is None else min(length, max_len)


def _rope(fields: _Fields) -> RopeScaling:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling`."""
    given = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise fields.fail(f"rope_parameters must be an object, not {given!r}")
    kind = given.get("rope_type") or given.get("type") or "default"
    theta = _number(fields, given, "rope_theta", fields.number("rope_theta", 10000.0))
    if kind not in ("default", "linear", "llama3"):
        raise fields.fail(f"rope type {kind!r} not supported; known: default, linear, llama3")
    original = given.get("original_max_position_embeddings") or fields.integer(
        "max_position_embeddings", 8192
    )
    return RopeScaling(
        theta=theta,
        kind=kind,
        factor=_number(fields, given, "factor", 1.0),
        low_freq_factor=_number(fields, given, "low_freq_factor", 1.0),
        high_freq_factor=_number(fields, given, "high_freq_factor", 4.0),
        original_max_position=int(original),
    )


def _generation(fields: _Fields) -> tuple[tuple[int, ...], dict[str, float | int]]:
    """End tokens and sampling defaults; generation_config.json wins over config.json."""
    path = Path(fields.file).with_name("generation_config.json")
    given = _read_json(path) if path.exists() else {}
    eos = given.get("eos_token_id", fields.values.get("eos_token_id"))
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) for token in ends):
        raise CheckpointError(f"eos_token_id must be integers, not {eos!r}", file=str(path))
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    sampling = {name: given[name] for name in names if isinstance(given.get(name), int | float)}
    if given.get("do_sample") is False:
        sampling = {"temperature": 0.0}
    return tuple(ends), sampling
