"""Has the kernels of a model's products loaded before steps need them.

cuBLAS chooses a kernel by the sizes of a product, and the driver loads it where it is first launched, or
captured: 3.5 to 5 ms each, four or five of them for a number of rows that is new, in which the loop does
nothing else. So each product is captured once for the numbers of rows that steps may have, on a thread beside
the loop, and what was captured is thrown away. Nothing runs and nothing is read: operands are addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from prism.attention.gpu.few_rows import is_few
from prism.attention.gpu.fp8 import is_fast
from prism.attention.gpu.kernels import takes_lt
from prism.memory.cuda_calls import Capture, CudaCalls
from prism.memory.tensors import tensor_at
from prism.modelspec import ModelSpec
from prism.types import Address

PLACE_BITS = 40
"""Operands do not overlap."""


class Product(NamedTuple):
    """A matrix of a model, and how kernels.py multiplies rows by it."""

    channels: int
    width: int
    has_bias: bool = False
    is_added: bool = False
    """To the residual stream."""
    is_fp8: bool = False


def products_of(spec: ModelSpec) -> tuple[Product, ...]:
    """Those of a layer and the head's."""
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    all_heads = heads + 2 * spec.num_kv_heads * spec.head_dim
    is_fp8 = is_fast(spec)
    return (
        Product(all_heads, hidden, has_bias=spec.attention_bias, is_fp8=is_fp8),
        Product(hidden, heads, has_bias=spec.output_bias, is_added=True, is_fp8=is_fp8),
        Product(2 * spec.intermediate_size, hidden, is_fp8=is_fp8),
        Product(hidden, spec.intermediate_size, is_added=True, is_fp8=is_fp8),
        Product(spec.vocab_size, hidden),
    )


class Products:
    """A model's products on a stream that nobody else uses, in a thread whose device is the stream's.

    cuBLAS keeps some 96 MiB for both, for good: 98 were seen, with all kernels.
    """

    def __init__(
        self,
        stream: torch.cuda.Stream,
        calls: CudaCalls,
        products: tuple[Product, ...],
        dtype: torch.dtype,
    ) -> None:
        self.device = stream.device
        self._stream = stream
        self._calls = calls
        self._products = products
        self._operands = Operands(stream.device, dtype)
        with self._place():
            one = torch.zeros(32, 32, dtype=torch.bfloat16, device=stream.device)
            torch.mm(one, one)  # cuBLAS takes its memory
            torch.addmm(one[0], one, one)
            stream.synchronize()

    def load(self, numbers: Iterable[int]) -> Iterator[None]:
        """Kernels for these numbers of rows, one number at a time. Raises `DriverError`."""
        for rows in numbers:
            self.capture([rows])
            yield

    def capture(self, numbers: Iterable[int]) -> Capture:
        """All products for these numbers of rows. Raises `DriverError`."""
        with self._place(), self._calls.capture(self._stream.cuda_stream) as capture:
            for rows in numbers:
                for product in self._products:
                    self._operands.multiply(product, rows)
        return capture

    @contextmanager
    def _place(self) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            yield


class Operands:
    """Tensors without memory."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype

    def multiply(self, product: Product, rows: int) -> None:
        """What kernels.py calls for so many rows times the matrix."""
        if product.is_fp8:
            self._multiply_fp8(product, rows)
            return
        bias = None
        if product.has_bias or (product.is_added and takes_lt(rows, product.channels)):
            bias = self._tensor(3, product.channels)
        x, matrix = self._tensor(0, rows, product.width), self._tensor(1, product.channels, product.width)
        out = self._tensor(2, rows, product.channels)
        if bias is None:
            torch.mm(x, matrix.t(), out=out)
        else:
            torch.addmm(bias, x, matrix.t(), out=out)

    def _multiply_fp8(self, product: Product, rows: int) -> None:
        if is_few(rows, product.width):
            return
        fp8 = torch.float8_e4m3fn
        torch._scaled_mm(
            self._tensor(0, rows, product.width, dtype=fp8),
            self._tensor(1, product.channels, product.width, dtype=fp8).t(),
            scale_a=self._tensor(4, rows, 1, dtype=torch.float32),
            scale_b=self._tensor(5, 1, product.channels, dtype=torch.float32),
            bias=self._tensor(3, product.channels) if product.has_bias else None,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            out=self._tensor(2, rows, product.channels),
        )

    def _tensor(self, place: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        address = Address((1 + place) << PLACE_BITS)
        return tensor_at(address, shape, dtype or self._dtype, None, self._device)
