"""Queues a model's steps on a lane and never waits: tokens feed the next step on the device.

A step of decodes alone is a CUDA graph. Its inputs, one column a sequence, are the slot, the position and the
block of that position; everything else is on the device: block tables and newest tokens by slot. So is a step
with few prompt tokens, padded, decodes first, then chunks. With many, and while there is no graph for it, a
step is launched kernel by kernel, in pieces.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import torch
from torch import Tensor

from prism.attention.gpu.decode import Split, choose_split
from prism.attention.gpu.kernels import GpuPlan
from prism.attention.gpu.rows import decode_inputs
from prism.attention.kernels import KvView, Stream
from prism.engine.gpu.draws import RandomDraws
from prism.engine.gpu.flight import Event, GpuFlight
from prism.engine.gpu.graphs import (
    DECODES_BESIDE,
    LAUNCH_BOUND,
    LIKELY_PROMPT_ROWS,
    LIKELY_SIZES,
    MAX_CHUNKS,
    Graphs,
    Key,
    padded_prompts,
    padded_size,
)
from prism.engine.gpu.inputs import MixedSize, TableNotes, mixed_plan, stage_columns, stage_mixed
from prism.engine.gpu.lane import GpuLane
from prism.engine.gpu.staging import Staging
from prism.engine.pieces import Need, Work
from prism.engine.sampler import Sampled, sample
from prism.engine.scheduler import Step
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
        self._most_prompt_rows = int(LAUNCH_BOUND / max(1, layer_size(model)))

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
        for rows in LIKELY_PROMPT_ROWS:
            key = self._prompt_key(0, rows, 1)
            if key is not None:
                self._want(key, is_urgent=False)

    def _want(self, key: Key, *, is_urgent: bool) -> None:
        if key.prompt_rows:
            work = partial(self._captured_mixed, MixedSize.of_graph(key), key.split)
        else:
            work = partial(self._captured_work, key.size, key.split)
        self._graphs.want(key, work, is_urgent=is_urgent)

    def _found(self, key: Key) -> Key | None:
        """A graph for a step, which is captured if there is none that is meant for it."""
        found = self._graphs.find(key)
        if found != key:
            self._want(key, is_urgent=found is None)
        return found

    def _split(self, size: int, longest: int) -> Split:
        return choose_split(size, self.model.spec.num_kv_heads, longest)

    # --- decodes ------------------------------------------------------------------------------------

    def _decode(self, step: Step) -> GpuFlight:
        """A graph of its size, or a larger one's; if there is none, kernel by kernel until it is captured."""
        lane, chunks = self.lane, step.chunks
        wanted = padded_size(len(chunks), lane.shape.max_batch)
        longest = max(chunk.start for chunk in chunks) + 1
        key = Key(id(self), wanted, self._split(wanted, longest))
        found = self._found(key)
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
        """A graph that holds it, if it is small; else, and while there is none, kernel by kernel."""
        lane = self.lane
        decodes = [c for c in step.chunks if c.length == 1]
        chunks = (*decodes, *(c for c in step.chunks if c.length > 1))
        size = MixedSize.of(chunks)
        longest = max((c.start for c in decodes), default=0) + 1
        key = None if is_apart else self._small_key(size, len(chunks), longest)
        split = self._split(max(1, size.decodes), longest)
        found = None
        if key is not None:
            found = self._found(key)
            used = found or key  # padded in any case: with other shapes products round differently
            size, split = MixedSize.of_graph(used), used.split
        pinned, tokens = lane.apart_buffers if is_apart else lane.next_buffers()
        staging = Staging(pinned, lane.staging)
        stage_mixed(staging, chunks, size)
        notes = TableNotes(staging, chunks, self.kv, lane.shape.max_blocks, newest_known=False)
        sampled = tuple(c.sequence for c in chunks if c.samples)
        draws = self._stage_draws(staging, sampled)
        work = self._mixed_work(staging, size, split, found, notes, draws, sampled, tokens, is_apart=is_apart)
        return self._flight(step, sampled, tokens, work)

    def _small_key(self, size: MixedSize, num_chunks: int, longest: int) -> Key | None:
        """The graph that a step should have; None if it is none of the small ones."""
        if num_chunks - size.decodes > MAX_CHUNKS:
            return None
        return self._prompt_key(size.decodes, size.prompt_rows, longest)

    def _prompt_key(self, decodes: int, prompt_rows: int, longest: int) -> Key | None:
        shape = self.lane.shape
        rows = padded_prompts(prompt_rows, min(self._most_prompt_rows, shape.max_tokens))
        beside = next((n for n in DECODES_BESIDE if decodes <= n <= shape.max_batch - MAX_CHUNKS), None)
        if rows is None or beside is None:
            return None
        return Key(id(self), beside, self._split(beside, longest), rows)

    def _mixed_work(
        self,
        staging: Staging,
        size: MixedSize,
        split: Split,
        graph: Key | None,
        notes: TableNotes,
        draws: RandomDraws | None,
        sampled: tuple[Sequence, ...],
        tokens: Tensor,
        *,
        is_apart: bool,
    ) -> Work:
        lane, vocab, places = self.lane, self.model.spec.vocab_size, size.places
        words = staging.send()
        notes.apply(words, lane)
        if is_apart:  # others stage their inputs in the same place
            words = words.clone()
        logits = None
        if is_apart:
            logits = words.new_empty(size.sampled, vocab, dtype=self._dtype)
        if graph is not None:
            yield self.model.num_groups
        if graph is None or not self._graphs.replay(graph):
            yield from self._mixed_layers(words, size, split, logits)
        if not sampled:
            return None
        if logits is None:
            logits = lane.logits(len(sampled), vocab, self._dtype)
        slots = words[places.last_slots][: len(sampled)]
        return (yield from self._finish(sampled, draws, words, tokens, slots, logits))

    def _captured_mixed(self, size: MixedSize, split: Split) -> Work:
        yield from self._mixed_layers(self.lane.staging, size, split, None)
        return None

    def _mixed_layers(
        self, words: Tensor, size: MixedSize, split: Split, logits: Tensor | None
    ) -> Generator[Need, None, None]:
        """From the staged words to logits, the lane's unless others are given, and to likeliest tokens."""
        lane, model, places = self.lane, self.model, size.places
        plan = mixed_plan(words, size, self.kv, model.spec.num_heads, split)
        yield 1
        ids = words[places.ids]
        ids = torch.where(ids < 0, lane.last_tokens[plan.slots], ids)
        rows = words[places.last_rows].long()
        stream = yield from model.layers(lane.kernels, plan, model.embedded(ids), rows)
        yield model.num_groups
        if not size.sampled:
            return
        if logits is None:
            logits = lane.logits(size.sampled, model.spec.vocab_size, self._dtype)
        model.logits(lane.kernels, stream, logits)
        lane.draw_greedy(logits, words[places.last_slots])

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
        else:
            draws.apply(words, logits, slots, drawn, lane.last_tokens)
        tokens[: len(sampled)].copy_(drawn, non_blocking=True)
        return known

    def _flight(self, step: Step, sampled: tuple[Sequence, ...], tokens: Tensor, work: Work) -> GpuFlight:
        for sequence in sampled:  # for the steps behind this one
            sequence.is_token_placed = True
        return GpuFlight(step, sampled, tokens[: len(sampled)], self.lane.stream, work)


def layer_size(model: Decoder) -> int:
    """Weights of a layer that each token is multiplied by."""
    layer = model.weights[0]
    return sum(w.values.numel() for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
