"""Has the kernels of a model's steps compiled and loaded before the first step needs them.

Triton compiles a kernel once a machine (about a second each; afterwards it is in its cache) and loads it once
a process. What a kernel is compiled for are widths, number formats and flags, not the number of rows, so
small tensors do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prism.attention.gpu.argmax import PARTS, draw_greedy
from prism.attention.gpu.decode import SCRATCH_BYTES, Split, choose_split, decode_attention
from prism.attention.gpu.few_rows import PADDED, few_linear, is_few
from prism.attention.gpu.few_rows import choose_tile as choose_few_tile
from prism.attention.gpu.fp8 import is_fast, norm_quantised, quantised, silu_mul_quantised
from prism.attention.gpu.linear import choose_tile, is_supported, vector_linear
from prism.attention.gpu.prefill import Chunk, prefill_attention, tiles_of
from prism.attention.gpu.products import products_of
from prism.attention.gpu.rows import decode_inputs, rms_norm, rotate_and_store, silu_mul
from prism.attention.gpu.sampling import draw_random
from prism.attention.kernels import HeadNorms, Stream, Weight
from prism.memory.tensors import torch_dtype
from prism.modelspec import ModelSpec

SPLITS = (
    *(Split(parts, 64) for parts in (32, 16)),
    *(Split(parts, 256) for parts in (8, 4, 2, 1)),
    Split(8, 1024),
)


def load_kernels(
    stream: torch.cuda.Stream, spec: ModelSpec, dtype: torch.dtype, tokens_per_block: int
) -> None:
    """Use each kernel once, on `stream`: cuBLAS keeps 32 MiB for each stream that it has been used on."""
    device = stream.device
    with torch.inference_mode(), torch.cuda.stream(stream):
        _products(device, spec, dtype)
        _rows(device, spec, dtype)
        _few_rows(device, spec)
        _attention(device, spec, dtype, tokens_per_block)
        _torch_operations(device, dtype)
        stream.synchronize()


def _products(device: torch.device, spec: ModelSpec, dtype: torch.dtype) -> None:
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    all_heads = heads + 2 * spec.num_kv_heads * spec.head_dim
    of_layers = torch_dtype(spec.matrix_dtype)
    for size, width, silu, has_norm, has_bias, kind in (
        (all_heads, hidden, False, True, spec.attention_bias, of_layers),
        (hidden, heads, False, False, spec.output_bias, of_layers),
        (spec.intermediate_size, hidden, True, True, False, of_layers),
        (hidden, spec.intermediate_size, False, False, False, of_layers),
        (spec.vocab_size, hidden, False, True, False, dtype),
    ):
        is_fp8 = kind is torch.float8_e4m3fn
        if not is_supported(width, is_fp8=is_fp8):
            continue
        rows = 16 if size % 16 == 0 else 17  # a kernel is compiled for sizes that 16 divides, or for any
        x = torch.zeros(1, width, dtype=dtype, device=device)
        values = torch.zeros(rows * (1 + silu), width, dtype=torch.uint8, device=device)
        values = values.view(kind) if is_fp8 else values.to(dtype)
        scale = torch.zeros(len(values), dtype=torch.float32, device=device) if is_fp8 else None
        out = torch.zeros(1, rows, dtype=dtype, device=device)
        vector_linear(
            x,
            Weight(values, scale),
            out,
            norm=x[0] if has_norm else None,
            eps=spec.norm_eps,
            bias=out[0] if has_bias else None,
            residual=None if has_norm else out,
            silu=silu,
            tile=choose_tile(size, width, silu=silu, is_fp8=is_fp8),
        )


def _few_rows(device: torch.device, spec: ModelSpec) -> None:
    for size, width, has_bias, _, is_fp8 in products_of(spec):
        for rows in PADDED if is_fp8 and is_few(1, width) else ():
            values = torch.zeros(64, width, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
            scales = torch.zeros(64, 1, dtype=torch.float32, device=device)
            bias = torch.zeros(64, dtype=torch.bfloat16, device=device) if has_bias else None
            tile = choose_few_tile(rows, size, width)
            few_linear(values[:rows], scales[:rows], Weight(values, scales[:, 0]), bias, tile)


def _rows(device: torch.device, spec: ModelSpec, dtype: torch.dtype) -> None:
    x = torch.zeros(2, spec.hidden_size, dtype=dtype, device=device)
    for rows in (1, 2):  # launched in different ways
        for delta in (None, x[:rows].clone()):
            rms_norm(Stream(x[:rows].clone(), delta), x[0], spec.norm_eps)
        silu_mul(torch.zeros(rows, 2 * spec.intermediate_size, dtype=dtype, device=device))
        if is_fast(spec):
            _quantising_rows(device, spec, dtype, rows)


def _quantising_rows(device: torch.device, spec: ModelSpec, dtype: torch.dtype, rows: int) -> None:
    x = torch.zeros(rows, spec.hidden_size, dtype=dtype, device=device)
    for delta in (None, x.clone()):
        norm_quantised(Stream(x.clone(), delta), x[0], spec.norm_eps)
    silu_mul_quantised(torch.zeros(rows, 2 * spec.intermediate_size, dtype=dtype, device=device))
    quantised(torch.zeros(rows, spec.num_heads * spec.head_dim, dtype=dtype, device=device))


def _attention(device: torch.device, spec: ModelSpec, dtype: torch.dtype, tokens: int) -> None:
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim

    def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.zeros(*shape, dtype=kind, device=device)

    pages, tables = zeros(1, 2, tokens, kv_heads, dim), zeros(4, 16, kind=torch.int32)
    norms = HeadNorms(zeros(dim), zeros(dim), spec.norm_eps) if spec.qk_norm else None
    angles, scratch = zeros(2, dim, kind=torch.float32), zeros(SCRATCH_BYTES, kind=torch.uint8)
    last_tokens, embed = zeros(4, kind=torch.int32), zeros(2, spec.hidden_size)
    for rows in (1, 2):  # launched in different ways
        step, slots = zeros(3, rows, kind=torch.int32), zeros(rows, kind=torch.int32)
        decode_inputs(step, tables, last_tokens, embed, tokens)
        qkv, out = zeros(rows, heads + 2 * kv_heads, dim), zeros(rows, heads, dim)
        q = rotate_and_store(qkv, pages, tables, slots, slots, angles, heads, norms)
        for split in SPLITS if rows > 1 else {choose_split(1, kv_heads, 1)}:
            decode_attention(q, pages, tables, slots, slots, scratch, split, out)
        tiles = torch.tensor(tiles_of([Chunk(0, rows, rows, 0)]), dtype=torch.int32, device=device)
        prefill_attention(qkv, heads, pages, tables, tiles, out)
        best, place = zeros(rows, PARTS, kind=torch.float32), zeros(rows, PARTS, kind=torch.int32)
        logits = zeros(rows, spec.vocab_size)
        draw_greedy(logits, best, place, slots, slots, last_tokens)
    numbers = zeros(1, kind=torch.float32)
    draw_random(
        logits,
        slots[:1],
        temperature=numbers,
        top_k=slots[:1],
        top_p=numbers,
        min_p=numbers,
        uniforms=numbers.double(),
        slots=slots,
        out=slots,
        last_tokens=last_tokens,
    )


def _torch_operations(device: torch.device, dtype: torch.dtype) -> None:
    """What steps with prompts, and draws on the host, use of torch: 1 to 22 ms each the first time."""
    ids = torch.zeros(2, dtype=torch.int32, device=device)
    x = torch.zeros(2, 8, dtype=dtype, device=device)
    ids = torch.where(ids < 0, ids[ids], ids)
    rows = ids.long()
    x = F.embedding(ids, x)[rows]
    x.index_copy_(0, rows, x.clone())
    torch.argmax(x.float(), dim=-1)
    torch.log_softmax(x.float(), dim=-1)
