"""What a request is answered does not depend on what happens to its sequences on the way.

A runner that has a GPU's tables, rows and staged columns, and whose KV is a digest of all tokens up to a
place: a wrong block, row or token anywhere makes another answer.
"""

from __future__ import annotations

from random import Random

import pytest
import torch

from prism.attention.kernels import KvView
from prism.engine.engine import Engine, EngineRequest
from prism.engine.gpu.columns import DecodeRows, TableNotes, slots_of, stage_columns
from prism.engine.gpu.staging import Staging
from prism.engine.kv_blocks import KvSpace
from prism.engine.kv_layout import KvLayout
from prism.engine.kv_slab import BlockKey, Dropped
from prism.engine.runner import InFlight
from prism.engine.sampler import Sampled
from prism.engine.scheduler import Slots
from prism.engine.sequence import Sequence
from prism.engine.step import Step
from prism.types import Bytes, RequestId, SamplingParams, SlabId

NUM_SLOTS, STRIDE, MAX_LEN, VOCAB = 8, 64, 28, 50
SIZE, PER_SLAB, NUM_SLABS = 4, 4, 8


def digest(before: int, token: int) -> int:
    return (before * 1000003 + token * 7919 + 17) % ((1 << 31) - 1)


def token_of(value: int) -> int:
    return (value >> 5) % VOCAB


def answer(prompt: list[int], params: SamplingParams) -> list[int]:
    """Each token by itself, from the beginning."""
    value, output = 0, list[int]()
    for token in prompt:
        value = digest(value, token)
    while (token := token_of(value)) not in params.stop_token_ids:
        output.append(token)
        if len(output) == params.max_tokens or len(prompt) + len(output) == MAX_LEN:
            break
        value = digest(value, token)
    return output


class Lane:
    def __init__(self) -> None:
        self.tables = torch.zeros(NUM_SLOTS + 1, STRIDE, dtype=torch.int32)
        self.last_tokens = torch.zeros(NUM_SLOTS + 1, dtype=torch.int32)


class Flight:
    def __init__(self, step: Step, tokens: list[int]) -> None:
        self.step, self.sampled, self.is_begun, self.is_launched = step, step.sampled, True, True
        self._tokens = tokens

    def launch(self, num_groups: int | None = None, seconds: float = 0.0) -> bool:
        return False

    def is_done(self) -> bool:
        return True

    def draws(self) -> Sampled:
        return Sampled(self._tokens, {})


class DigestRunner:
    """Runs a step when it is made; what is told of it comes later."""

    kv: KvView

    def __init__(self) -> None:
        self.lane = Lane()
        self.rows = DecodeRows()
        self.memory: dict[tuple[int, int], int] = {}
        self.host: dict[BlockKey, list[int]] = {}

    def num_worth(self, keys: object) -> int:
        """See `HostTier`."""
        count = 0
        for key in keys:  # type: ignore[attr-defined]
            if key not in self.host:
                break
            count += 1
        return count

    def use(self, key: BlockKey) -> BlockKey:
        """See `HostTier`."""
        return key

    def save(self, dropped: Dropped) -> None:
        self.host[dropped.key] = [self.memory[dropped.block, place] for place in range(SIZE)]

    def move(self, source: int, target: int) -> None:
        for place in range(SIZE):
            if (value := self.memory.get((source, place))) is not None:
                self.memory[target, place] = value

    def run(self, step: Step, *, is_apart: bool = False) -> InFlight:
        for dropped in step.dropped:
            self.save(dropped)
        for key, block in step.fetches:
            for place, value in enumerate(self.host[key]):  # type: ignore[index]
                self.memory[block, place] = value
        self._enter(step)
        values = [self._decode(sequence.slot or 0, p) for sequence, p in self._positions(step)]
        for sequence, start, length, samples in step.prompts:
            value = self._before(sequence.slot or 0, start)
            for position in range(start, start + length):
                value = digest(value, sequence.tokens[position])
                self._store(sequence.slot or 0, position, value)
            if samples:
                values.append(value)
        tokens = [token_of(value) for value in values]
        for sequence, token in zip(step.sampled, tokens, strict=True):
            self.lane.last_tokens[sequence.slot or 0] = token
            sequence.is_token_placed = True
        return Flight(step, tokens)

    def _enter(self, step: Step) -> None:
        words, slots = torch.zeros(4096, dtype=torch.int32), slots_of(step.decodes)
        staging, padded = Staging(words.numpy()), len(slots) + 3
        if step.prompts:
            self.rows.forget()
        else:
            self.rows.look(step)
            assert self.rows.slots.tolist() == slots.tolist()
            assert self.rows.blocks.tolist() == [sequence.blocks[-1] for sequence in step.decodes]
            stage_columns(staging, step, self.rows, padded)
        notes = TableNotes(staging, step, STRIDE, newest_known=not step.prompts)
        sent = words[: staging.num_words]
        notes.apply(sent, self.lane)  # type: ignore[arg-type]
        if not step.prompts:
            for slot, position, block in sent[: 3 * padded].view(3, padded).T.tolist():
                if position >= 0:
                    self.lane.tables[slot, position // SIZE] = block

    def _positions(self, step: Step) -> list[tuple[Sequence, int]]:
        return list(zip(step.decodes, step.positions.tolist(), strict=True))

    def _decode(self, slot: int, position: int) -> int:
        value = digest(self._before(slot, position), int(self.lane.last_tokens[slot]))
        self._store(slot, position, value)
        return value

    def _before(self, slot: int, position: int) -> int:
        return self.memory[self._place(slot, position - 1)] if position else 0

    def _store(self, slot: int, position: int, value: int) -> None:
        self.memory[self._place(slot, position)] = value

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return int(self.lane.tables[slot, position // SIZE]), position % SIZE


class World:
    def __init__(self, random: Random) -> None:
        layout = KvLayout(SIZE, Bytes(64), Bytes(64), Bytes(64 * PER_SLAB))
        self.kv, self.runner, self.random = KvSpace(layout), DigestRunner(), random
        for slab in range(NUM_SLABS):
            self.kv.add_slab(SlabId(slab))
        slots = Slots(NUM_SLOTS, random.choice([24, 1 << 60]))
        self.engine = Engine(self.kv, self.runner, slots, max_len=MAX_LEN, max_batch_size=6)
        if random.random() < 0.7:
            self.engine.scheduler.host = self.runner  # type: ignore[assignment]
        self.queue: list[InFlight] = []
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.ended: set[tuple[str, int]] = set()

    def come(self) -> None:
        random, name = self.random, f"r{len(self.requests)}"
        prompt = [(i * 7 + (random.choice([0, 0, 0, 3]) if i > 6 else 0)) % VOCAB for i in range(18)]
        params = SamplingParams(
            n=random.choice([1, 1, 2, 3]),
            max_tokens=random.randint(1, 14),
            temperature=0.0,
            seed=0,
            stop_token_ids=random.sample(range(VOCAB), random.choice([0, 2])),
            presence_penalty=random.choice([0.0, 0.0, 0.5]),  # which waits for each token; not applied here
        )
        self.requests[name] = prompt[: random.randint(1, 18)], params
        self.outputs |= {(name, choice): [] for choice in range(params.n)}
        self.engine.add(EngineRequest(RequestId(name), *self.requests[name], arrival=random.random()))

    def leave(self) -> None:
        name, choice = self.random.choice([*self.requests, ""]), self.random.choice([None, 0])
        for sequence in self.engine.scheduler.sequences_of(RequestId(name)):
            if choice in (None, sequence.choice):
                del self.outputs[name, sequence.choice]
        self.engine.cancel(RequestId(name), choice)

    def compact(self) -> None:
        gathered = self.kv.gather(1) if self.random.random() < 0.5 else self.kv.compact(1)
        for group in gathered.dropped:
            for dropped in group:
                self.runner.save(dropped)
        for move in gathered.moves:
            self.runner.move(*move)
        self.engine.scheduler.rename_blocks(gathered.moves)

    def step(self) -> bool:
        if len(self.queue) == 2:
            return False
        step = self.engine.schedule(self.random.choice([1, 2, 3, 5, 8, 30]))
        if step is not None:
            self.queue.append(self.engine.run(step))
        return step is not None

    def commit(self) -> bool:
        if not self.queue:
            return False
        drawn = self.engine.commit(self.queue.pop(0))
        for place, sequence in enumerate(drawn.sequences):
            output, end = self.outputs[sequence.request_id, sequence.choice], drawn.ends.get(place)
            if end is None or end.stop_token is None:
                assert drawn.numbers[place] == len(output)
                output.append(drawn.tokens[place])
            if end is not None:
                self.ended.add((sequence.request_id, sequence.choice))
        return True


@pytest.mark.parametrize("seed", range(8))
def test_answers_are_the_same_whatever_happens(seed: int) -> None:
    random = Random(seed)
    world = World(random)
    scheduler = world.engine.scheduler
    for _ in range(300):
        weights = [15, 3, 5, 5, 36, 36]
        actions = (world.come, world.leave, lambda: scheduler.preempt_youngest(2), world.compact)
        random.choices((*actions, world.step, world.commit), weights)[0]()
        world.kv.check()
        scheduler.check()
    while not world.engine.is_idle or world.queue:
        assert world.step() or world.commit()
    assert world.ended == world.outputs.keys() and scheduler.num_preemptions and scheduler.num_prefix_hits
    for (name, _), output in world.outputs.items():
        assert output == answer(*world.requests[name]), name
