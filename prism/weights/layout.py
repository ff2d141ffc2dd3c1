"""Where each weight lies in the flat buffer of a model: in execution order, fused as the layers want them.

The same plan serves the packer that writes the buffer and the engine that views it, so both derive it from
the model's spec alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from math import prod

from prism.modelspec import ModelSpec
from prism.types import Bytes, DType

ALIGNMENT = 256
"""Bytes; what vectorised loads and CUDA's libraries like best."""
SCALE = "_scale"
"""Ends the name of the entry behind a quantised matrix: one number for each of its rows."""


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the buffer: its sources, one after the other along their first dimension.

    Scales have no sources: they are computed with the matrix before them.
    """

    name: str
    offset: Bytes
    shape: tuple[int, ...]
    dtype: DType
    sources: tuple[Source, ...]

    @property
    def size(self) -> Bytes:
        """Bytes without padding."""
        return Bytes(prod(self.shape) * self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole buffer."""

    entries: tuple[Entry, ...]
    group_ends: tuple[Bytes, ...]
    """Byte offsets at which the embedding, each layer and the head (final norm included) are complete."""

    @property
    def total_bytes(self) -> Bytes:
        """Size of the buffer, a multiple of the alignment."""
        return self.group_ends[-1]

    @property
    def num_parameters(self) -> int:
        """Numbers of the checkpoint, in whatever format."""
        return sum(prod(entry.shape) for entry in self.entries if entry.sources)

    @property
    def scales(self) -> dict[str, Entry]:
        """By name of the quantised matrix, where its scales lie."""
        return {e.name.removesuffix(SCALE): e for e in self.entries if e.name.endswith(SCALE)}

    @property
    def fingerprint(self) -> str:
        """Equal for equal layouts only: both ends of a transfer compare it."""
        return blake2b(repr(self).encode(), digest_size=16).hexdigest()


def plan_layout(spec: ModelSpec) -> Layout:
    """The buffer of one model. Groups: embedding, each layer, head."""
    groups = [[_embedding(spec)], *(list(_layer(spec, i)) for i in range(spec.num_layers)), list(_head(spec))]
    entries: list[Entry] = []
    ends, offset = [], 0

    def place(name: str, shape: tuple[int, ...], dtype: DType, sources: tuple[Source, ...]) -> None:
        nonlocal offset
        entries.append(Entry(name, Bytes(offset), shape, dtype, sources))
        offset += -(-entries[-1].size // ALIGNMENT) * ALIGNMENT

    for group in groups:
        for name, sources in group:
            rows = sum(source.shape[0] for source in sources)
            dtype = spec.matrix_dtype if _is_quantised(name) else spec.dtype
            place(name, (rows, *sources[0].shape[1:]), dtype, sources)
            if dtype is DType.F8:
                place(name + SCALE, (rows,), DType.F32, ())
        ends.append(Bytes(offset))
    return Layout(tuple(entries), tuple(ends))


def _is_quantised(name: str) -> bool:
    """Whether quantisation applies to an entry: to the four matrices of a layer.

    Embeddings and head stay as they are. The head's errors would be errors of logits, with nothing behind
    to average them; it has 7 % of the bytes of an 8B model, and where it is tied, it is the embedding too.
    """
    return name.rpartition(".")[2] in ("qkv", "o", "gate_up", "down")


_Fused = tuple[str, tuple[Source, ...]]


def _embedding(spec: ModelSpec) -> _Fused:
    return "embed", (Source("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size)),)


def _head(spec: ModelSpec) -> Iterator[_Fused]:
    yield "norm", (Source("model.norm.weight", (spec.hidden_size,)),)
    if not spec.tied_embeddings:
        yield "lm_head", (Source("lm_head.weight", (spec.vocab_size, spec.hidden_size)),)


def _layer(spec: ModelSpec, index: int) -> Iterator[_Fused]:
    hidden, queries = spec.hidden_size, spec.num_heads * spec.head_dim
    ours, theirs = f"layers.{index}", f"model.layers.{index}"
    heads = {"q": queries, "k": spec.num_kv_heads * spec.head_dim, "v": spec.num_kv_heads * spec.head_dim}

    def single(name: str, source: str, *shape: int) -> _Fused:
        return f"{ours}.{name}", (Source(f"{theirs}.{source}", shape),)

    def heads_of(suffix: str, *columns: int) -> tuple[Source, ...]:
        return tuple(
            Source(f"{theirs}.self_attn.{x}_proj.{suffix}", (rows, *columns)) for x, rows in heads.items()
        )

    yield single("input_norm", "input_layernorm.weight", hidden)
    yield f"{ours}.qkv", heads_of("weight", hidden)
    if spec.attention_bias:
        yield f"{ours}.qkv_bias", heads_of("bias")
    if spec.qk_norm:
        yield single("q_norm", "self_attn.q_norm.weight", spec.head_dim)
        yield single("k_norm", "self_attn.k_norm.weight", spec.head_dim)
    yield single("o", "self_attn.o_proj.weight", hidden, queries)
    if spec.output_bias:
        yield single("o_bias", "self_attn.o_proj.bias", hidden)
    yield single("post_norm", "post_attention_layernorm.weight", hidden)
    gates = tuple(
        Source(f"{theirs}.mlp.{x}_proj.weight", (spec.intermediate_size, hidden)) for x in ("gate", "up")
    )
    yield f"{ours}.gate_up", gates
    yield single("down", "mlp.down_proj.weight", hidden, spec.intermediate_size)
