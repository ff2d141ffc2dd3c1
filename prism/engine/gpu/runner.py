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
from prism.engine.gpu.columns import DecodeRows, slots_of, stage_columns
from prism.engine.gpu.draw_table import DrawPlaces
from prism.engine.gpu.flight import GpuFlight
from prism.engine.gpu.graphs import (
    LAUNCH_BOUND,
    LIKELY_PROMPTS,
    LIKELY_SIZES,
    MAX_CHUNKS,
    Graphs,
    Key,
    padded_beside,
    padded_prompts,
    padded_size,
)
from prism.engine.gpu.inputs import MixedForm, MixedSize, StepInputs, mixed_plan, stage_mixed
from prism.engine.gpu.lane import GpuLane
from prism.engine.gpu.staging import Staging
from prism.engine.pieces import Need, Work
from prism.engine.sampler import Sampled, sample
from prism.engine.step import Step
from prism.models.decoder import Decoder


class GpuRunner:
    """One model on one lane."""

    def __init__(self, model: Decoder, kv: KvView, lane: GpuLane, graphs: Graphs) -> None:
        self.model = model
        self.kv = kv
        self.lane = lane
        self._graphs = graphs
        self._rows = DecodeRows()
        self._dtype = model.embed.dtype
        self._most_prompt_rows = int(LAUNCH_BOUND / max(1, layer_size(model)))

    def run(self, step: Step, *, is_apart: bool = False) -> GpuFlight:
        """See `Runner.run`."""
        return self._mixed(step, is_apart) if is_apart or step.has_prompts else self._decode(step)

    def expect(self) -> None:
        """Have graphs of likely sizes captured when there is nothing else to do."""
        for size in LIKELY_SIZES:
            if size <= self.lane.shape.max_batch:
                self._want(Key(id(self), size, self._split(size, 1)), is_urgent=False)
        for beside, rows in LIKELY_PROMPTS:
            key = self._prompt_key(min(beside, self.lane.shape.max_batch), rows, 1)
            if key is not None:
                self._want(key, is_urgent=False)

    def _want(self, key: Key, *, is_urgent: bool) -> None:
        if key.prompt_rows:
            work = partial(self._captured_mixed, MixedForm(MixedSize.of_graph(key), key.split))
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
        lane = self.lane
        wanted = padded_size(len(step.decodes), lane.shape.max_batch)
        key = Key(id(self), wanted, self._split(wanted, int(step.positions.max()) + 1))
        found = self._found(key)
        used = found or key
        buffers, rows = lane.next_buffers(), self._rows
        staging = Staging(buffers.words)
        rows.look(step)
        stage_columns(staging, step, rows, used.size)
        inputs = StepInputs(buffers, staging, step, rows.slots, lane, used.size, newest_known=True)
        shortcut = partial(self._replay, inputs, used) if found and inputs.is_plain else None
        work = self._decode_work(inputs, used, has_graph=found is not None)
        return GpuFlight(step, inputs.sampled, inputs.tokens, lane, work, shortcut)

    def _replay(self, inputs: StepInputs, key: Key) -> bool:
        """A step that is nothing but its graph; False if that has been dropped meanwhile."""
        if key not in self._graphs:
            return False
        inputs.send_words()
        self._graphs.replay(key, self.lane.stream)
        self.lane.fetch_drawn(inputs.tokens)
        return True

    def _decode_work(self, inputs: StepInputs, key: Key, *, has_graph: bool) -> Work:
        count = len(inputs.sampled)
        words = inputs.send()
        yield self.model.num_groups
        if not (has_graph and self._graphs.replay(key, self.lane.stream)):
            yield from self._captured_work(key.size, key.split)
        logits = self.lane.logits(count, self.model.spec.vocab_size, self._dtype)
        return (yield from self._finish(inputs, words[:count], logits))

    def _captured_work(self, size: int, split: Split) -> Work:
        """What a graph holds: from the staged columns to the lane's logits and tokens."""
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
        lane.draw_random(lane.staging, DrawPlaces.behind(3 * size, size), logits, slots)
        return None

    # --- steps with prompt chunks -------------------------------------------------------------------

    def _mixed(self, step: Step, is_apart: bool) -> GpuFlight:
        """A graph that holds it, if it is small; else, and while there is none, kernel by kernel.

        One that is apart may have decodes alone: prompts of one token.
        """
        lane = self.lane
        self._rows.forget()
        form, found = self._form(step, is_apart)
        buffers = lane.apart_buffers if is_apart else lane.next_buffers()
        staging, slots = Staging(buffers.words), slots_of(step.decodes)
        stage_mixed(staging, step, slots, form.size)
        inputs = StepInputs(buffers, staging, step, slots, lane, form.size.sampled, newest_known=False)
        work = self._mixed_work(inputs, form, found, is_apart=is_apart)
        return GpuFlight(step, inputs.sampled, inputs.tokens, lane, work)

    def _form(self, step: Step, is_apart: bool) -> tuple[MixedForm, Key | None]:
        """Padded in any case if the step could have a graph: with other shapes products round differently."""
        size = MixedSize.of(step)
        longest = int(step.positions.max(initial=0)) + 1
        key = None if is_apart else self._small_key(size, len(step.prompts), longest)
        if key is None:
            return MixedForm(size, self._split(max(1, size.decodes), longest)), None
        found = self._found(key)
        used = found or key
        return MixedForm(MixedSize.of_graph(used), used.split), found

    def _small_key(self, size: MixedSize, num_prompts: int, longest: int) -> Key | None:
        """The graph that a step should have; None if it is none of the small ones."""
        if num_prompts > MAX_CHUNKS:
            return None
        return self._prompt_key(size.decodes, size.prompt_rows, longest)

    def _prompt_key(self, decodes: int, prompt_rows: int, longest: int) -> Key | None:
        shape = self.lane.shape
        rows = padded_prompts(prompt_rows, min(self._most_prompt_rows, shape.max_tokens))
        beside = padded_beside(decodes, shape.max_batch)
        if rows is None or beside is None:
            return None
        return Key(id(self), beside, self._split(beside, longest), rows)

    def _mixed_work(self, inputs: StepInputs, form: MixedForm, graph: Key | None, *, is_apart: bool) -> Work:
        lane, vocab, size = self.lane, self.model.spec.vocab_size, form.size
        words = inputs.send()
        if is_apart:  # others stage their inputs in the same place
            words = words.clone()
        logits = None
        if is_apart:
            logits = words.new_empty(size.sampled, vocab, dtype=self._dtype)
        if graph is not None:
            yield self.model.num_groups
        if graph is None or not self._graphs.replay(graph, lane.stream):
            yield from self._mixed_layers(words, form, logits)
        count = len(inputs.sampled)
        if not count:
            return None
        if logits is None:
            logits = lane.logits(count, vocab, self._dtype)
        slots = words[size.places.last_slots][:count]
        return (yield from self._finish(inputs, slots, logits))

    def _captured_mixed(self, form: MixedForm) -> Work:
        yield from self._mixed_layers(self.lane.staging, form, None)
        return None

    def _mixed_layers(
        self, words: Tensor, form: MixedForm, logits: Tensor | None
    ) -> Generator[Need, None, None]:
        """From the staged words to logits, the lane's unless others are given, and to tokens."""
        lane, model, size, places = self.lane, self.model, form.size, form.size.places
        plan = mixed_plan(words, form, self.kv, model.spec.num_heads)
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
        slots = words[places.last_slots]
        lane.draw_greedy(logits, slots)
        lane.draw_random(words, places.draws, logits, slots)

    # --- draws --------------------------------------------------------------------------------------

    def _finish(self, inputs: StepInputs, slots: Tensor, logits: Tensor) -> Work:
        """Send the tokens to the host, which may have to draw them itself.

        Draws on the host need logits that are there: the last piece comes once the others have run.
        """
        lane, drawn = self.lane, self.lane.drawn[: len(inputs.sampled)]
        known: Sampled | None = None
        if inputs.on_host:
            yield lane.event().is_done
            known = sample(logits.float(), inputs.sampled)
            drawn.copy_(torch.tensor(known.tokens, dtype=torch.int32))
            lane.last_tokens.index_copy_(0, slots.long(), drawn)
        lane.fetch_drawn(inputs.tokens)
        return known


def layer_size(model: Decoder) -> int:
    """Weights of a layer that each token is multiplied by."""
    layer = model.weights[0]
    return sum(w.values.numel() for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
