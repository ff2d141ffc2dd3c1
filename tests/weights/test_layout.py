from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.modelspec import ModelSpec, RopeScaling
from prism.types import DType
from prism.weights.layout import ALIGNMENT, plan_layout

SPEC = ModelSpec(
    family="llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-6,
    rope=RopeScaling(theta=10000.0),
    max_position=128,
    tied_embeddings=False,
    attention_bias=False,
    output_bias=False,
    qk_norm=False,
    dtype=DType.BF16,
    eos_token_ids=(),
    default_sampling={},
)

specs = st.builds(
    replace,
    st.just(SPEC),
    vocab_size=st.integers(1, 300),
    num_layers=st.integers(1, 4),
    intermediate_size=st.integers(1, 200),
    head_dim=st.sampled_from([8, 24, 128]),
    tied_embeddings=st.booleans(),
    attention_bias=st.booleans(),
    output_bias=st.booleans(),
    qk_norm=st.booleans(),
    dtype=st.sampled_from([DType.BF16, DType.F16, DType.F32]),
    quantization=st.sampled_from(["none", "fp8"]),
)


def test_a_plain_model_has_these_entries_in_this_order() -> None:
    entries = plan_layout(replace(SPEC, num_layers=1)).entries
    assert [(entry.name, entry.shape) for entry in entries] == [
        ("embed", (96, 32)),
        ("layers.0.input_norm", (32,)),
        ("layers.0.qkv", (64, 32)),
        ("layers.0.o", (32, 32)),
        ("layers.0.post_norm", (32,)),
        ("layers.0.gate_up", (96, 32)),
        ("layers.0.down", (32, 48)),
        ("norm", (32,)),
        ("lm_head", (96, 32)),
    ]


def test_a_model_with_everything_has_these_entries_in_a_layer() -> None:
    spec = replace(
        SPEC, attention_bias=True, output_bias=True, qk_norm=True, tied_embeddings=True, head_dim=24
    )
    layout = plan_layout(spec)
    shapes = {e.name.removeprefix("layers.1."): e.shape for e in layout.entries if "layers.1." in e.name}
    assert list(shapes.items()) == [
        ("input_norm", (32,)),
        ("qkv", (192, 32)),
        ("qkv_bias", (192,)),
        ("q_norm", (24,)),
        ("k_norm", (24,)),
        ("o", (32, 96)),
        ("o_bias", (32,)),
        ("post_norm", (32,)),
        ("gate_up", (96, 32)),
        ("down", (32, 48)),
    ]
    assert layout.entries[-1].name == "norm"


def test_fused_entries_keep_this_order() -> None:
    entries = {entry.name: entry for entry in plan_layout(replace(SPEC, attention_bias=True)).entries}

    def parts(name: str) -> list[tuple[str, int]]:
        sources = entries[f"layers.1.{name}"].sources
        return [(source.name.removeprefix("model.layers.1."), source.shape[0]) for source in sources]

    heads = [("q", 32), ("k", 16), ("v", 16)]
    assert parts("qkv") == [(f"self_attn.{x}_proj.weight", rows) for x, rows in heads]
    assert parts("qkv_bias") == [(f"self_attn.{x}_proj.bias", rows) for x, rows in heads]
    assert parts("gate_up") == [("mlp.gate_proj.weight", 48), ("mlp.up_proj.weight", 48)]


@given(specs)
def test_entries_are_aligned_in_order_and_apart(spec: ModelSpec) -> None:
    layout = plan_layout(spec)
    before, end = layout.entries[0], 0
    for entry in layout.entries:
        assert entry.offset % ALIGNMENT == 0
        assert end <= entry.offset < end + ALIGNMENT
        name = entry.name.rpartition(".")[2]
        if spec.quantization == "fp8" and name.endswith("_scale"):
            assert entry.dtype is DType.F32 and not entry.sources
            assert layout.scales[before.name] is entry and before.shape[0] == entry.shape[0]
        else:
            quantised = spec.quantization == "fp8" and name in ("qkv", "o", "gate_up", "down")
            assert entry.dtype is (DType.F8 if quantised else spec.dtype)
            assert sum(source.shape[0] for source in entry.sources) == entry.shape[0]
        assert all(source.shape[1:] == entry.shape[1:] for source in entry.sources)
        before, end = entry, entry.offset + entry.size
    assert layout.total_bytes == -(-end // ALIGNMENT) * ALIGNMENT


@given(specs)
def test_a_group_is_complete_where_its_last_entry_ends(spec: ModelSpec) -> None:
    layout = plan_layout(spec)
    assert len(layout.group_ends) == spec.num_layers + 2
    down = "down_scale" if spec.quantization == "fp8" else "down"
    names = ["embed", *(f"layers.{i}.{down}" for i in range(spec.num_layers)), layout.entries[-1].name]
    ends = {entry.name: entry.offset + entry.size for entry in layout.entries}
    for name, group_end in zip(names, layout.group_ends, strict=True):
        assert 0 <= group_end - ends[name] < ALIGNMENT


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": DType.F16},
        {"num_heads": 2},
        {"qk_norm": True},
        {"tied_embeddings": True},
        {"quantization": "fp8"},
    ],
)
def test_different_layouts_have_different_fingerprints(change: dict[str, object]) -> None:
    assert plan_layout(SPEC).fingerprint == plan_layout(replace(SPEC, norm_eps=1.0)).fingerprint
    assert plan_layout(SPEC).fingerprint != plan_layout(replace(SPEC, **change)).fingerprint  # type: ignore[arg-type]


@given(specs)
def test_quantisation_changes_bytes_and_nothing_else(spec: ModelSpec) -> None:
    plain, small = (plan_layout(replace(spec, quantization=kind)) for kind in ("none", "fp8"))
    assert small.num_parameters == plain.num_parameters
    scales = {entry.name for entry in small.scales.values()}
    assert [e.name for e in small.entries if e.name not in scales] == [e.name for e in plain.entries]
    assert not plain.scales and len(scales) == 4 * spec.num_layers
    sizes = [{e.name: e.size for e in layout.entries} for layout in (plain, small)]
    for name in small.scales:
        assert sizes[0][name] == spec.dtype.itemsize * sizes[1][name]
        assert sizes[1][f"{name}_scale"] == 4 * small.scales[name].shape[0]
