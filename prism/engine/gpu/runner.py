"""Queues a model's steps on a lane and never waits: tokens feed the next step on the device.

A step of decodes alone is a CUDA graph. Its inputs, one column a sequence, are the slot, the position and the
block of that position; everything else is on the device: block tables and newest tokens by slot. Steps with
prompt chunks run as they are: decodes first, then chunks.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from prism.attention.gpu.decode import Split, choose_split
from prism.attention.gpu.kernels import GpuPlan
from prism.attention.gpu.prefill import Chunk as PromptChunk
from prism.attention.gpu.prefill import tiles_of
from prism.attention.gpu.rows import decode_inputs
from prism.attention.kernels import KvView, Stream
from prism.engine.gpu.draws import RandomDraws
from prism.engine.gpu.graphs import Graphs, padded_size
from prism.engine.gpu.lane import GpuLane
from prism.engine.gpu.staging import Staging
from prism.engine.sampler import Sampled, sample
from prism.engine.scheduler import Chunk, Step
from prism.engine.sequence import Sequence
from prism.models.decoder import Decoder


class GpuFlight:
    """A queued step. Its tokens lie in pinned memory once its event has come."""

    def __init__(self, step: Step, sampled: tuple[Sequence, ...], tokens: Tensor) -> None:
        self.step = step
        self.sampled = sampled
        self._tokens = tokens
        self._known: list[Sampled] | None = None
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record()

    def know(self, drawn: list[Sampled]) -> None:
        """The draws were made on the host."""
        self._known = drawn

    def is_done(self) -> bool:
        """See `InFlight.is_done`."""
        done: bool = self.event.query()  # type: ignore[no-untyped-call]
        return done

    def draws(self) -> list[Sampled]:
        """See `InFlight.draws`."""
        self.event.synchronize()
        if self._known is not None:
            return self._known
        return [Sampled(token, None) for token in self._tokens.tolist()]


class GpuRunner:
    """One model on one lane."""

    def __init__(self, model: Decoder, kv: KvView, lane: GpuLane, graphs: Graphs) -> None:
        self.model = model
        self.kv = kv
        self.lane = lane
        self._graphs = graphs
        self._dtype = model.embed.dtype

    def run(self, step: Step) -> GpuFlight:
        """See `Runner.run`."""
        with torch.inference_mode(), torch.cuda.stream(self.lane.stream):
            if all(chunk.length == 1 and chunk.samples for chunk in step.chunks):
                return self._decode(step)
            return self._mixed(step)

    # --- decodes ------------------------------------------------------------------------------------

    def _decode(self, step: Step) -> GpuFlight:
        lane, spec = self.lane, self.model.spec
        chunks = step.chunks
        size = padded_size(len(chunks), lane.shape.max_batch)
        longest = max(chunk.start for chunk in chunks) + 1
        split = choose_split(size, spec.num_kv_heads, longest)
        pinned, tokens = lane.next_buffers()
        staging = Staging(pinned, lane.staging)
        self._stage_columns(staging, chunks, size)
        notes = _TableNotes(staging, chunks, self.kv, lane.shape.max_blocks, newest_known=True)
        draws = self._stage_draws(staging, [chunk.sequence for chunk in chunks])
        words = staging.send()
        notes.apply(words, lane)
        work = partial(self._decode_work, size, split)
        self._graphs.run((id(self), size, split), work)
        sampled = tuple(chunk.sequence for chunk in chunks)
        return self._finish(step, sampled, draws, words, tokens, words[: len(chunks)])

    def _stage_columns(self, staging: Staging, chunks: tuple[Chunk, ...], size: int) -> None:
        """`[3, size]`: slots, positions, blocks; the first staged words, where graphs read them."""
        padding = size - len(chunks)
        per_block = self.kv.tokens_per_block
        slots = [*(chunk.sequence.slot or 0 for chunk in chunks), *[0] * padding]
        positions = [*(chunk.start for chunk in chunks), *[-1] * padding]
        blocks = [*(c.sequence.blocks[c.start // per_block] for c in chunks), *[0] * padding]
        staging.ints(slots + positions + blocks)

    def _decode_work(self, size: int, split: Split) -> None:
        """What a graph holds: from the staged columns to the lane's logits and likeliest tokens."""
        lane, model = self.lane, self.model
        columns = lane.staging[: 3 * size].view(3, size)
        hidden, slots, positions = decode_inputs(
            columns, lane.tables, lane.last_tokens, model.embed, self.kv.tokens_per_block
        )
        plan = GpuPlan(self.kv, model.spec.num_heads, slots, positions, size, split, None)
        stream = model.layers(lane.kernels, plan, Stream(hidden))
        logits = lane.logits(size, model.spec.vocab_size, self._dtype)
        model.logits(lane.kernels, stream, logits)
        lane.draw_greedy(logits, slots)

    # --- steps with prompt chunks -------------------------------------------------------------------

    def _mixed(self, step: Step) -> GpuFlight:
        lane, model = self.lane, self.model
        decodes = [c for c in step.chunks if c.length == 1]
        prompts = [c for c in step.chunks if c.length > 1]
        chunks = (*decodes, *prompts)
        pinned, tokens = lane.next_buffers()
        staging = Staging(pinned, lane.staging)
        inputs = _MixedInputs(staging, chunks)
        notes = _TableNotes(staging, chunks, self.kv, lane.shape.max_blocks, newest_known=False)
        sampled = tuple(c.sequence for c in chunks if c.samples)
        draws = self._stage_draws(staging, sampled)
        words = staging.send()
        notes.apply(words, lane)
        longest = max((c.start for c in decodes), default=0) + 1
        split = choose_split(max(1, len(decodes)), model.spec.num_kv_heads, longest)
        plan = inputs.plan(words, self.kv, model.spec.num_heads, len(decodes), split)
        ids = words[inputs.ids]
        ids = torch.where(ids < 0, lane.last_tokens[plan.slots], ids)
        stream = model.layers(lane.kernels, plan, model.embedded(ids), words[inputs.last_rows].long())
        if sampled:
            logits = lane.logits(len(sampled), model.spec.vocab_size, self._dtype)
            model.logits(lane.kernels, stream, logits)
            lane.draw_greedy(logits, words[inputs.last_slots])
        return self._finish(step, sampled, draws, words, tokens, words[inputs.last_slots])

    # --- draws --------------------------------------------------------------------------------------

    def _stage_draws(
        self, staging: Staging, sampled: list[Sequence] | tuple[Sequence, ...]
    ) -> RandomDraws | None:
        if any(sequence.needs_history for sequence in sampled):
            return None
        return RandomDraws(staging, sampled)

    def _finish(
        self,
        step: Step,
        sampled: tuple[Sequence, ...],
        draws: RandomDraws | None,
        words: Tensor,
        tokens: Tensor,
        slots: Tensor,
    ) -> GpuFlight:
        """Where the likeliest token is not the one, draw; send the tokens to the host."""
        lane = self.lane
        tokens, drawn = tokens[: len(sampled)], lane.drawn[: len(sampled)]
        known = None
        if sampled:
            logits = lane.logits(len(sampled), self.model.spec.vocab_size, self._dtype)
            if draws is None:
                known = sample(logits.float(), sampled)
                drawn.copy_(torch.tensor([draw.token for draw in known], dtype=torch.int32))
                lane.last_tokens.index_copy_(0, slots.long(), drawn)
            elif draws.apply(words, logits, drawn):
                lane.last_tokens.index_copy_(0, slots.long(), drawn)
            tokens.copy_(drawn, non_blocking=True)
            for sequence in sampled:
                sequence.is_token_placed = True
        flight = GpuFlight(step, sampled, tokens)
        if known is not None:
            flight.know(known)
        return flight


class _MixedInputs:
    """Inputs of a step with prompt chunks, decodes first."""

    def __init__(self, staging: Staging, chunks: tuple[Chunk, ...]) -> None:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last_rows: list[int] = []
        prompts: list[PromptChunk] = []
        for sequence, start, length, samples in chunks:
            assert sequence.slot is not None
            known = sequence.tokens[start : start + length]
            if length > 1:
                prompts.append(PromptChunk(len(ids), length, start + length, sequence.slot))
            ids += known or [-1]
            positions += range(start, start + length)
            slots += [sequence.slot] * length
            if samples:
                last_rows.append(len(ids) - 1)
        tiles = tiles_of(prompts)
        self.ids = staging.ints(ids)
        self._positions = staging.ints(positions)
        self._slots = staging.ints(slots)
        self.last_rows = staging.ints(last_rows)
        self.last_slots = staging.ints([slots[row] for row in last_rows])
        self._num_tiles = len(tiles)
        self._tiles = staging.ints([word for tile in tiles for word in tile])

    def plan(self, words: Tensor, kv: KvView, num_heads: int, num_decodes: int, split: Split) -> GpuPlan:
        """Attention over these inputs, once they are on the device."""
        tiles = words[self._tiles].view(self._num_tiles, 5) if self._num_tiles else None
        return GpuPlan(kv, num_heads, words[self._slots], words[self._positions], num_decodes, split, tiles)


class _TableNotes:
    """What the lane's tables do not know yet of the sequences of a step.

    With `newest_known` the step itself notes the block of each position.
    """

    def __init__(
        self, staging: Staging, chunks: tuple[Chunk, ...], kv: KvView, stride: int, *, newest_known: bool
    ) -> None:
        places: list[int] = []
        blocks: list[int] = []
        slots: list[int] = []
        tokens: list[int] = []
        for sequence, start, length, _ in chunks:
            assert sequence.slot is not None
            used = (start + length - 1) // kv.tokens_per_block + 1
            if sequence.num_tabled < used - newest_known:
                base = sequence.slot * stride
                places += range(base + sequence.num_tabled, base + used)
                blocks += sequence.blocks[sequence.num_tabled : used]
            sequence.num_tabled = used
            if length == 1 and start < len(sequence.tokens) and not sequence.is_token_placed:
                slots.append(sequence.slot)
                tokens.append(sequence.tokens[start])
        self._tables = (staging.ints(places), staging.ints(blocks)) if places else None
        self._tokens = (staging.ints(slots), staging.ints(tokens)) if slots else None

    def apply(self, words: Tensor, lane: GpuLane) -> None:
        """Queue the changes; most decodes have none."""
        if self._tables is not None:
            places, blocks = self._tables
            lane.tables.view(-1).index_copy_(0, words[places].long(), words[blocks])
        if self._tokens is not None:
            slots, tokens = self._tokens
            lane.last_tokens.index_copy_(0, words[slots].long(), words[tokens])
