"""Steps in plain torch operations that have run when they are launched: the runner of CPUs."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from prism.attention.kernels import BatchLayout, KvView
from prism.attention.torch_kernels import TorchKernels
from prism.engine.pieces import Pieces, Work
from prism.engine.sampler import NOTHING, Sampled, sample
from prism.engine.sequence import Sequence
from prism.engine.step import Chunk, Step
from prism.models.decoder import Decoder
from prism.types import BlockId


class TorchFlight:
    """Launching it runs it."""

    def __init__(self, step: Step, sampled: tuple[Sequence, ...], work: Work) -> None:
        self.step = step
        self.sampled = sampled
        self.work = work
        self._pieces = Pieces(work)

    @property
    def is_begun(self) -> bool:
        """See `InFlight.is_begun`."""
        return self._pieces.is_begun

    @property
    def is_launched(self) -> bool:
        """See `InFlight.is_launched`."""
        return self._pieces.is_complete

    @torch.inference_mode()
    def launch(self, num_groups: int | None = None, seconds: float = float("inf")) -> bool:
        """See `InFlight.launch`. All that is possible runs at once: a step on a CPU holds the loop anyway."""
        return self._pieces.advance(num_groups, float("inf"))

    def is_done(self) -> bool:
        """See `InFlight.is_done`."""
        return self.is_launched

    def draws(self) -> Sampled:
        """See `InFlight.draws`."""
        assert self.is_launched
        return self._pieces.drawn or NOTHING


class TorchRunner:
    """See the module's docstring."""

    def __init__(self, model: Decoder, kernels: TorchKernels, kv: KvView) -> None:
        self.model = model
        self.kernels = kernels
        self.kv = kv

    @torch.inference_mode()
    def run(self, step: Step, *, is_apart: bool = False) -> TorchFlight:
        """See `Runner.run`. Its steps share nothing, so all of them may be apart."""
        device = self.kernels.device
        tokens: list[int] = []
        last_rows: list[int] = []
        chunks = step.chunks
        for sequence, start, length, samples in chunks:
            tokens += sequence.tokens[start : start + length]
            if samples:
                last_rows.append(len(tokens) - 1)
        ids = torch.tensor(tokens, dtype=torch.int64, device=device)
        rows = (
            torch.tensor(last_rows, dtype=torch.int64, device=device)
            if len(last_rows) < len(tokens)
            else None
        )
        layout = _layout(chunks, step.new_blocks)
        return TorchFlight(step, step.sampled, self._work(layout, ids, rows, step.sampled))

    def _work(
        self, layout: BatchLayout, ids: torch.Tensor, rows: torch.Tensor | None, sampled: tuple[Sequence, ...]
    ) -> Work:
        model = self.model
        plan = self.kernels.plan(layout, self.kv, model.spec.num_heads)
        yield 1
        stream = yield from model.layers(self.kernels, plan, model.embedded(ids), rows)
        yield model.num_groups
        if not sampled:
            return None
        return sample(model.logits(self.kernels, stream).float(), sampled)


def _layout(chunks: Seq[Chunk], new_blocks: Seq[BlockId]) -> BatchLayout:
    """Copies of the tables: blocks may move before the step is launched, and are copied behind it."""
    return BatchLayout(
        query_lens=[chunk.length for chunk in chunks],
        context_lens=[chunk.start + chunk.length for chunk in chunks],
        tables=[list(chunk.sequence.blocks) for chunk in chunks],
        new_blocks=new_blocks,
    )
