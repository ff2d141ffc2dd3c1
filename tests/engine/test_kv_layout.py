from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given

from prism.engine.kv_layout import MAX_LOSS, plan_kv_layout
from prism.modelspec import ModelSpec, RopeScaling
from prism.types import Bytes, DType, MiB

LLAMA_8B = ModelSpec(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope=RopeScaling(500000.0),
    max_position=8192,
    tied_embeddings=False,
    attention_bias=False,
    output_bias=False,
    qk_norm=False,
    dtype=DType.BF16,
    eos_token_ids=(128001,),
    default_sampling={},
)


def test_llama_8b_fills_its_slabs() -> None:
    layout = plan_kv_layout(LLAMA_8B, Bytes(32 * MiB))
    assert layout is not None
    assert (layout.tokens_per_block, layout.block_bytes, layout.blocks_per_slab) == (16, 2 * MiB, 16)
    assert layout.loss == 0


@pytest.mark.parametrize(
    ("layers", "kv_heads", "dim"), [(28, 4, 128), (28, 2, 128), (36, 8, 128), (16, 8, 64)]
)
def test_real_shapes_lose_little(layers: int, kv_heads: int, dim: int) -> None:
    spec = dataclasses.replace(LLAMA_8B, num_layers=layers, num_kv_heads=kv_heads, head_dim=dim)
    layout = plan_kv_layout(spec, Bytes(32 * MiB))
    assert layout is not None
    assert layout.loss <= MAX_LOSS


@given(st.integers(1, 80), st.integers(1, 16), st.sampled_from([32, 64, 80, 96, 128]), st.integers(1, 5))
def test_blocks_lie_in_slabs_at_whole_units(layers: int, kv_heads: int, dim: int, power: int) -> None:
    spec = dataclasses.replace(LLAMA_8B, num_layers=layers, num_kv_heads=kv_heads, head_dim=dim)
    slab = Bytes((1 << power) * MiB)
    layout = plan_kv_layout(spec, slab)
    if layout is None:
        assert 16 * spec.kv_bytes_per_token > slab
        return
    assert layout.block_bytes % layout.unit == 0
    assert slab % layout.unit == 0
    ids = [layout.block_at(Bytes(3 * slab), i) for i in range(layout.blocks_per_slab)]
    ends = [i * layout.unit + layout.block_bytes for i in ids]
    assert ids[0] * layout.unit == 3 * slab
    assert all(end <= start * layout.unit for end, start in zip(ends, ids[1:], strict=False))
    assert ends[-1] <= 4 * slab
