"""Queues a model's steps on a lane and never waits: tokens feed the next step on the device.

A step of decodes alone is a CUDA graph. Its inputs, one column a sequence, are the slot, the position and the
block of that position; everything else is on the device: block tables and newest tokens by slot. With prompt
chunks, and while there is no graph for it, a step is launched kernel by kernel, in pieces: decodes first,
then chunks.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from prism.attention.gpu.decode import Split, choose_split
from prism.attention.gpu.kernels import GpuPlan
from prism.attention.gpu.rows import decode_inputs
from prism.attention.kernels import KvView, Stream
from prism.engine.gpu.draws import RandomDraws
from prism.engine.gpu.flight import Event, GpuFlight
from prism.engine.gpu.graphs import LIKELY_SIZES, Graphs, Key, padded_size
from prism.engine.gpu.inputs import MixedInputs, TableNotes, stage_columns
from prism.engine.gpu.lane import GpuLane
from prism.engine.gpu.staging import Staging
from prism.engine.pieces import Work
from prism.engine.sampler import Sampled, sample
from prism.engine.scheduler import Chunk, Step
from prism.engine.sequence import Sequence
from prism.models.decoder import Decoder


class GpuRunner:
    """One model on one lane."""

    def __init__(self, model: Decoder, kv: KvView, lane: GpuLane, graphs: Graphs) -> None:
        self.model = model
        self.kv = kv
        self.lane = lane
        self._graphs = graphs
        self._dtype = model.embed.dtype

    def run(self, step: Step, *, is_apart: bool = False) -> GpuFlight:
        """See `Runner.run`."""
        if not is_apart and all(chunk.length == 1 and chunk.samples for chunk in step.chunks):
            return self._decode(step)
        return self._mixed(step, is_apart)

    def expect(self) -> None:
        """Have graphs of likely sizes captured when there is nothing else to do."""
        for size in LIKELY_SIZES:
            if size <= self.lane.shape.max_batch:
                self._want(Key(id(self), size, self._split(size, 1)), is_urgent=False)

    def _want(self, key: Key, *, is_urgent: bool) -> None:
        self._graphs.want(key, partial(self._captured_work, key.size, key.split), is_urgent=is_urgent)

    def _split(self, size: int, longest: int) -> Split:
        return choose_split(size, self.model.spec.num_kv_heads, longest)

    # --- decodes ------------------------------------------------------------------------------------

    def _decode(self, step: Step) -> GpuFlight:
        """A graph of its size, or a larger one's; if there is none, kernel by kernel until it is captured."""
        lane, chunks = self.lane, step.chunks
        wanted = padded_size(len(chunks), lane.shape.max_batch)
        longest = max(chunk.start for chunk in chunks) + 1
        key = Key(id(self), wanted, self._split(wanted, longest))
        found = self._graphs.find(key)
        if found != key:
            self._want(key, is_urgent=found is None)
        used = found or key
        pinned, tokens = lane.next_buffers()
        staging = Staging(pinned, lane.staging)
        stage_columns(staging, chunks, used.size, self.kv.tokens_per_block)
        notes = TableNotes(staging, chunks, self.kv, lane.shape.max_blocks, newest_known=True)
        sampled = tuple(chunk.sequence for chunk in chunks)
        draws = self._stage_draws(staging, sampled)
        work = self._decode_work(staging, notes, draws, sampled, tokens, used, has_graph=found is not None)
        return self._flight(step, sampled, tokens, work)

    def _decode_work(
        self,
        staging: Staging,
        notes: TableNotes,
        draws: RandomDraws | None,
        sampled: tuple[Sequence, ...],
        tokens: Tensor,
        key: Key,
        *,
        has_graph: bool,
    ) -> Work:
        words = staging.send()
        notes.apply(words, self.lane)
        yield self.model.num_groups
        if not (has_graph and self._graphs.replay(key)):
            yield from self._captured_work(key.size, key.split)
        logits = self.lane.logits(len(sampled), self.model.spec.vocab_size, self._dtype)
        return (yield from self._finish(sampled, draws, words, tokens, words[: len(sampled)], logits))

    def _captured_work(self, size: int, split: Split) -> Work:
        """What a graph holds: from the staged columns to the lane's logits and likeliest tokens."""
        lane, model = self.lane, self.model
        columns = lane.staging[: 3 * size].view(3, size)
        hidden, slots, positions = decode_inputs(
            columns, lane.tables, lane.last_tokens, model.embed, self.kv.tokens_per_block
        )
        plan = GpuPlan(self.kv, model.spec.num_heads, slots, positions, size, split, None)
        stream = yield from model.layers(lane.kernels, plan, Stream(hidden))
        yield model.num_groups
        logits = lane.logits(size, model.spec.vocab_size, self._dtype)
        model.logits(lane.kernels, stream, logits)
        lane.draw_greedy(logits, slots)
        return None

    # --- steps with prompt chunks -------------------------------------------------------------------

    def _mixed(self, step: Step, is_apart: bool) -> GpuFlight:
        lane = self.lane
        decodes = [c for c in step.chunks if c.length == 1]
        prompts = [c for c in step.chunks if c.length > 1]
        chunks = (*decodes, *prompts)
        pinned, tokens = lane.apart_buffers if is_apart else lane.next_buffers()
        staging = Staging(pinned, lane.staging)
        inputs = MixedInputs(staging, chunks)
        notes = TableNotes(staging, chunks, self.kv, lane.shape.max_blocks, newest_known=False)
        sampled = tuple(c.sequence for c in chunks if c.samples)
        draws = self._stage_draws(staging, sampled)
        work = self._mixed_work(staging, inputs, notes, draws, sampled, tokens, decodes, is_apart)
        return self._flight(step, sampled, tokens, work)

    def _mixed_work(
        self,
        staging: Staging,
        inputs: MixedInputs,
        notes: TableNotes,
        draws: RandomDraws | None,
        sampled: tuple[Sequence, ...],
        tokens: Tensor,
        decodes: list[Chunk],
        is_apart: bool,
    ) -> Work:
        lane, model = self.lane, self.model
        words = staging.send()
        notes.apply(words, lane)
        if is_apart:  # others stage their inputs in the same place
            words = words.clone()
        split = self._split(max(1, len(decodes)), max((c.start for c in decodes), default=0) + 1)
        plan = inputs.plan(words, self.kv, model.spec.num_heads, len(decodes), split)
        yield 1
        ids = words[inputs.ids]
        ids = torch.where(ids < 0, lane.last_tokens[plan.slots], ids)
        stream = yield from model.layers(
            lane.kernels, plan, model.embedded(ids), words[inputs.last_rows].long()
        )
        yield model.num_groups
        if not sampled:
            return None
        size = (len(sampled), model.spec.vocab_size)
        logits = words.new_empty(size, dtype=self._dtype) if is_apart else lane.logits(*size, self._dtype)
        model.logits(lane.kernels, stream, logits)
        lane.draw_greedy(logits, words[inputs.last_slots])
        return (yield from self._finish(sampled, draws, words, tokens, words[inputs.last_slots], logits))

    # --- draws --------------------------------------------------------------------------------------

    def _stage_draws(self, staging: Staging, sampled: tuple[Sequence, ...]) -> RandomDraws | None:
        if any(sequence.needs_history for sequence in sampled):
            return None
        return RandomDraws(staging, sampled)

    def _finish(
        self,
        sampled: tuple[Sequence, ...],
        draws: RandomDraws | None,
        words: Tensor,
        tokens: Tensor,
        slots: Tensor,
        logits: Tensor,
    ) -> Work:
        """Where the likeliest token is not the one, draw; send the tokens to the host.

        Draws on the host need logits that are there: the last piece comes once the others have run.
        """
        lane, drawn = self.lane, self.lane.drawn[: len(sampled)]
        known: list[Sampled] | None = None
        if draws is None:
            yield Event().is_done
            known = sample(logits.float(), sampled)
            drawn.copy_(torch.tensor([draw.token for draw in known], dtype=torch.int32))
            lane.last_tokens.index_copy_(0, slots.long(), drawn)
        elif draws.apply(words, logits, drawn):
            lane.last_tokens.index_copy_(0, slots.long(), drawn)
        tokens[: len(sampled)].copy_(drawn, non_blocking=True)
        return known

    def _flight(self, step: Step, sampled: tuple[Sequence, ...], tokens: Tensor, work: Work) -> GpuFlight:
        for sequence in sampled:  # for the steps behind this one
            sequence.is_token_placed = True
        return GpuFlight(step, sampled, tokens[: len(sampled)], self.lane.stream, work)
