"""A model's decoder with KV of its own, on the CPU."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from prism.attention.kernels import BatchLayout, KvView, Stream
from prism.attention.torch_kernels import TorchKernels
from prism.engine.kv_layout import KvLayout, plan_kv_layout
from prism.memory.host import HostDriver
from prism.memory.pool import SlabPool
from prism.models.decoder import Decoder
from prism.models.rotary import rotary_table
from prism.modelspec import read_spec
from prism.types import BlockId, Bytes, MiB, ModelId, Quantization
from prism.weights.client import pack_here
from prism.weights.layout import plan_layout
from prism.weights.protocol import WeightSource
from prism.weights.views import view_weights
from prism.worker.cpu_device import cpu_device

SLAB = Bytes(2 * MiB)
CPU = torch.device("cpu")


class CpuDecoder:
    """A decoder, and the blocks of some sequences."""

    def __init__(self, decoder: Decoder, view: KvView, layout: KvLayout) -> None:
        self.decoder = decoder
        self.kernels = TorchKernels(CPU)
        self._view = view
        self._layout = layout
        self._blocks: list[list[BlockId]] = []

    def add(self, num_tokens: int) -> int:
        """Room for a sequence; its number."""
        taken = sum(map(len, self._blocks))
        numbers = range(taken, taken + self._layout.num_blocks(num_tokens))
        self._blocks.append([BlockId(i * self._layout.block_bytes // self._layout.unit) for i in numbers])
        return len(self._blocks) - 1

    def layers(
        self, sequence: int, tokens: Sequence[int], start: int = 0, rows: torch.Tensor | None = None
    ) -> Generator[int, None, Stream]:
        """The layers over its tokens from `start` on; see `Decoder.layers`."""
        blocks = self._blocks[sequence]
        fresh = tuple(blocks) if start == 0 else ()
        batch = BatchLayout([len(tokens)], [start + len(tokens)], [blocks], fresh)
        plan = self.kernels.plan(batch, self._view, self.decoder.spec.num_heads)
        return self.decoder.layers(self.kernels, plan, self.decoder.embedded(torch.tensor(tokens)), rows)

    def logits(self, stream: Stream) -> torch.Tensor:
        """`[tokens, vocabulary]`."""
        return self.decoder.logits(self.kernels, stream).clone()


@contextmanager
def cpu_decoder(path: Path, quantization: Quantization = "none") -> Iterator[CpuDecoder]:
    """That of a model directory."""
    spec = read_spec(path, quantization=quantization)
    layout = plan_kv_layout(spec, SLAB)
    assert layout is not None
    device = cpu_device(driver := HostDriver(Bytes(2 * SLAB)), SlabPool(driver, SLAB, 2), "cpu:0")
    with (
        torch.inference_mode(),
        pack_here(WeightSource(model=ModelId("m"), path=str(path), quantization=quantization)) as packed,
    ):
        tensors = view_weights(plan_layout(spec), packed.address, CPU)
        decoder = Decoder(spec, tensors, rotary_table(spec.rope, spec.head_dim, spec.max_position))
        try:
            yield CpuDecoder(decoder, device.kv_view(spec, layout), layout)
        finally:
            device.close()
