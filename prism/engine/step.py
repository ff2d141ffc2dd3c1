"""One step of one engine: what it computes, and how it comes together. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prism.engine.host_blocks import Fetch
from prism.engine.kv_slab import Dropped
from prism.engine.sequence import Sequence
from prism.types import BlockId


class Chunk(NamedTuple):
    """Compute `length` tokens of a sequence from `start` on; draw a token behind the last if `samples`."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Decodes, hundreds of them perhaps, are columns; prompts, a few, are chunks."""

    decodes: tuple[Sequence, ...]
    """Each computes its newest token and draws the next."""
    positions: NDArray[np.int32]
    """Of those newest tokens."""
    context: int
    """Tokens whose KV the decodes read, all together."""
    prompts: tuple[Chunk, ...]
    """All others: they compute several tokens, or one without drawing."""
    begun: tuple[Sequence, ...] = ()
    """Decodes that begin a block, among others: when the step has run, that before it is full and known."""
    new_blocks: tuple[BlockId, ...] = ()
    """Blocks that get their first tokens in this step."""
    dropped: tuple[Dropped, ...] = ()
    """Cached blocks whose bytes this step may overwrite: what is to be saved of them is copied before it."""
    fetches: tuple[Fetch, ...] = ()
    """Copies that this step reads."""

    @property
    def has_prompts(self) -> bool:
        """It computes chunks of prompts, which fill a device; decodes alone do not."""
        return bool(self.prompts)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of those chunks."""
        return sum(chunk.length for chunk in self.prompts)

    @property
    def num_sequences(self) -> int:
        """How many take part."""
        return len(self.decodes) + len(self.prompts)

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """Sequences for which a token is drawn: decodes, then prompts."""
        return (*self.decodes, *(chunk.sequence for chunk in self.prompts if chunk.samples))

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All of it as chunks, decodes first; made anew each time."""
        pairs = zip(self.decodes, self.positions.tolist(), strict=True)
        return (*(Chunk(sequence, start, 1, True) for sequence, start in pairs), *self.prompts)


@dataclass(slots=True)
class Draft:
    """A step that is being put together."""

    budget: int
    """Tokens that it may still take."""
    entries: int
    """Blocks that it may still enter into the lane's tables."""
    decodes: list[Sequence] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    prompts: list[Chunk] = field(default_factory=list)
    begun: list[Sequence] = field(default_factory=list)
    new_blocks: list[BlockId] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Nothing has been taken yet."""
        return not self.decodes and not self.prompts

    def take(self, sequence: Sequence, length: int, tokens_per_block: int) -> None:
        """The next `length` tokens of a sequence, counted as computed from now on; its blocks have room."""
        start = sequence.num_computed
        samples = length == sequence.num_missing
        sequence.num_computed += length
        sequence.num_pending += samples
        if samples and not sequence.needs_history:
            sequence.ready_until = min(len(sequence.blocks) * tokens_per_block, sequence.end - 1)
        if samples and length == 1:
            self.decodes.append(sequence)
            self.positions.append(start)
            self.begun.append(sequence)
        else:
            self.prompts.append(Chunk(sequence, start, length, samples))
        self.budget -= length
        self.entries -= len(sequence.blocks) - sequence.num_tabled

    def step(self) -> Step:
        """As it stands."""
        return Step(
            tuple(self.decodes),
            np.array(self.positions, np.int32),
            sum(self.positions) + len(self.positions),
            tuple(self.prompts),
            tuple(self.begun),
            tuple(self.new_blocks),
            tuple(self.dropped),
            tuple(self.fetches),
        )
