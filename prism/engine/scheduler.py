"""What an engine runs next: which sequences, and how many tokens of each.

Pure: it mutates sequences and blocks and knows neither torch nor time. Decodes and prompt chunks share
a step. A step is made while the ones before it are still queued: it counts their tokens as computed, and
the tokens that they draw as pending. Memory is asked for beforehand by the worker (`wants`); what
could not be had bounds the step, and when even the decodes do not fit, the youngest sequence gives its blocks
back; what is not found again when it goes on, on the device or in host memory, is computed again.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, islice, takewhile
from typing import NamedTuple

from prism.engine.host_blocks import Fetch, HostTier
from prism.engine.kv_blocks import KvSpace, Move
from prism.engine.kv_slab import BlockKey
from prism.engine.sequence import Sequence
from prism.engine.step import Draft, Step
from prism.types import BlockId, Rank, RequestId

UNBOUNDED = 1 << 62


class Want(NamedTuple):
    """Free blocks that a sequence could use in the next step."""

    rank: Rank
    num_blocks: int
    is_again: bool = False
    """It has given way, and begins again with all that it had or not at all."""
    num_found: int = 0
    """Blocks of it that it would find: they are not among those that it wants, and are to stay."""


class Slots:
    """Rows of a lane's device tables; row 0 is nobody's."""

    def __init__(self, count: int, max_entries: int = UNBOUNDED) -> None:
        self._free = list(range(count, 0, -1))
        self.max_entries = max_entries
        """Blocks that one step may enter into the rows; one sequence may always enter its own."""

    @property
    def num_free(self) -> int:
        """Rows that can be taken."""
        return len(self._free)

    def take(self) -> int:
        """The lowest free row that was given back last."""
        return self._free.pop()

    def put(self, slot: int) -> None:
        """A row's sequence is gone."""
        self._free.append(slot)


class Scheduler:
    """Sequences of one model, oldest first, and their blocks."""

    def __init__(self, kv: KvSpace, max_batch_size: int, slots: Slots) -> None:
        self.kv = kv
        self.max_batch_size = max_batch_size
        self._slots = slots
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []  # admitted and not started, or preempted
        self._by_request: defaultdict[RequestId, list[Sequence]] = defaultdict(list)
        self.host: HostTier | None = None
        """Where blocks wait that have lost their place on the device."""
        self.num_changes = 0
        """It grows whenever sequences have changed, and with each step that is made or has run."""
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        """Tokens looked up in the prefix cache, each sequence once."""
        self.num_prefix_hits = 0
        self.num_looked_up = 0
        """The same of requests' first choices: others find what these have just computed."""
        self.num_found = 0

    def add(self, sequence: Sequence) -> None:
        """A new sequence."""
        self.num_changes += 1
        insort(self.waiting, sequence, key=_rank)
        self._by_request[sequence.request_id].append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended or is cancelled; its blocks go back.

        Queued steps may still read and write them: whoever gets them next is queued behind those.
        """
        self.num_changes += 1
        sequence.is_ended = True
        self._publish(sequence)
        (self.waiting if sequence.slot is None else self.running).remove(sequence)
        self._release(sequence)
        self._by_request[sequence.request_id].remove(sequence)
        if not self._by_request[sequence.request_id]:
            del self._by_request[sequence.request_id]

    def sequences_of(self, request_id: RequestId) -> list[Sequence]:
        """All unfinished choices of a request."""
        return list(self._by_request.get(request_id, ()))

    @property
    def prompts(self) -> list[Sequence]:
        """Running sequences that have more to compute than their newest token."""
        return [s for s in self.running if not s.ready_until and s.num_missing > 1]

    @property
    def num_sequences(self) -> int:
        """Unfinished sequences."""
        return len(self.running) + len(self.waiting)

    # --- the step ------------------------------------------------------------------------------------

    def wants(self, budget: int) -> list[Want]:
        """Free blocks that a step of `budget` tokens could use, by sequence, in the step's order."""
        wanted = []
        for sequence in chain(self.running, self._could_start()):
            if sequence.num_computed < sequence.ready_until:  # most: decodes with room
                budget -= 1
            elif budget <= 0:
                break
            elif sequence.needs_a_block:
                budget -= 1
                wanted.append(Want(sequence.rank, 1))
            elif not sequence.num_pending or sequence.can_step:
                length, want = self._want(sequence, budget)
                budget -= length
                if want.num_blocks > 0:
                    wanted.append(want)
        return wanted

    def _want(self, sequence: Sequence, budget: int) -> tuple[int, Want]:
        """Tokens that a sequence would compute, and what it lacks for them."""
        held, computed = len(sequence.blocks), sequence.num_computed
        if sequence.num_missing > self.kv.layout.tokens_per_block:
            held, computed = self._prefix(sequence)
        length = min(sequence.num_total - computed, budget)
        if sequence.is_again:
            return length, Want(sequence.rank, self._rest(sequence, held), is_again=True, num_found=held)
        return length, Want(sequence.rank, self.kv.layout.num_blocks(computed + length) - held)

    def _rest(self, sequence: Sequence, found: int) -> int:
        """Blocks for all that a sequence has and a token more, without those that it would find."""
        return self.kv.layout.num_blocks(sequence.num_total + 1) - found

    def _could_start(self) -> Iterator[Sequence]:
        """Waiting sequences that the next step could take, memory permitting, in its order."""
        places = min(self.max_batch_size - len(self.running), self._slots.num_free)
        able = (s for s in self.waiting if not s.num_pending and not self._must_follow(s))
        yield from islice(able, max(0, places))

    def _prefix(self, sequence: Sequence) -> tuple[int, int]:
        """Blocks that a sequence has or would find on the device, and tokens that it need not compute."""
        held, computed = len(sequence.blocks), sequence.num_computed
        for count, is_here in self._runs(sequence):
            held += count * is_here
            computed += count * self.kv.layout.tokens_per_block
        return held, computed

    def _runs(self, sequence: Sequence) -> Iterator[tuple[int, bool]]:
        """What a prompt need not compute next: so many blocks on the device, so many in host memory, ..."""
        size, found = self.kv.layout.tokens_per_block, len(sequence.blocks)
        if sequence.num_missing <= size or sequence.num_computed != found * size:
            return
        keys = sequence.full_keys(size, len(sequence.tokens) - 1)
        while True:
            count = self.kv.num_published(islice(keys, found, None))
            if count:
                yield count, True
            found += count
            if self.host is None or found == len(keys):
                return
            missing = takewhile(self.kv.is_missing, islice(keys, found, None))
            count = self.host.num_worth(missing)
            if not count:
                return
            yield count, False
            found += count

    def schedule(self, budget: int) -> Step | None:
        """The next step of at most `budget` tokens, or None when nothing can run.

        1. Running sequences in order: one token each for decodes, a chunk for unfinished prompts. Those that
           can only go on when tokens on their way are known sit out, and those whose tables the step cannot
           bring along beside the others'.
        2. A running sequence without room takes it from the prefix cache, then from the youngest running one
           (which may be itself).
        3. Waiting sequences, prefix cache first, as far as budget, batch size, tables and blocks reach.
        4. One that has given way begins again with all that it had: with a part of it it would hold memory
           that others want, get no further, and give way once more.
        """
        self.num_changes += 1
        draft = Draft(budget, self._slots.max_entries)
        decodes, positions = draft.decodes, draft.positions
        for sequence in self.running:  # 1; preemption shortens the list behind the present place only
            if draft.budget <= 0:
                break
            start = sequence.num_computed
            if start < sequence.ready_until:  # most: decodes with room
                sequence.num_computed = start + 1
                sequence.num_pending += 1
                decodes.append(sequence)
                positions.append(start)
                draft.budget -= 1
            elif not (sequence.needs_a_block and self._begin_block(sequence, draft)):
                self._go_on(sequence, draft)
        self._start_waiting(draft)  # 3
        return None if draft.is_empty else draft.step()

    def _begin_block(self, sequence: Sequence, draft: Draft) -> bool:
        """A decode takes one more block, if that is to be had just so.

        `_go_on` does the same and takes longer, and of hundreds of decodes some begin a block in each step.
        """
        if len(sequence.blocks) + 1 - sequence.num_tabled > draft.entries:
            return False
        taken = self.kv.allocate(1)
        if taken is None:
            return False
        sequence.blocks += taken
        draft.new_blocks += taken
        draft.take(sequence, 1, self.kv.layout.tokens_per_block)
        return True

    def _go_on(self, sequence: Sequence, draft: Draft) -> None:
        """A running sequence that needs more than its turn."""
        if sequence.num_pending and not sequence.can_step:
            return
        layout, missing = self.kv.layout, sequence.num_missing
        is_short = missing <= layout.tokens_per_block
        most = len(sequence.blocks) + 1 if is_short else layout.num_blocks(len(sequence.tokens))
        if most - sequence.num_tabled > draft.entries and not draft.is_empty:
            return
        if not is_short:
            missing = self._find_prefix(sequence, draft)
        length = self._make_room(sequence, min(missing, draft.budget), draft)  # 2
        if length:
            draft.take(sequence, length, layout.tokens_per_block)

    def _make_room(self, sequence: Sequence, length: int, draft: Draft) -> int:
        """Blocks for `length` more tokens, or for fewer; 0 when the sequence itself had to give way."""
        while True:
            fitting = self._extend(sequence, length, draft)
            if fitting:
                return fitting
            if self.kv.num_cached:
                draft.dropped += self.kv.drop_cached(self.kv.layout.num_blocks(length))
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return 0

    def _extend(self, sequence: Sequence, length: int, draft: Draft) -> int:
        """Give the sequence blocks for `length` tokens, or for as many as the free blocks hold."""
        layout, held, computed = self.kv.layout, len(sequence.blocks), sequence.num_computed
        missing = layout.num_blocks(computed + length) - held
        if missing > self.kv.num_free:
            missing = self.kv.num_free
            length = (held + missing) * layout.tokens_per_block - computed
        if missing <= 0:
            return length
        blocks = self.kv.allocate(missing)
        assert blocks is not None
        sequence.blocks += blocks
        draft.new_blocks += blocks
        return length

    def _start_waiting(self, draft: Draft) -> None:
        passed: list[Sequence] = []
        layout = self.kv.layout
        while self.waiting and draft.budget > 0 and self._has_place():
            sequence = self.waiting.pop(0)
            if sequence.num_pending or self._must_follow(sequence):
                passed.append(sequence)
                continue
            if not draft.is_empty and layout.num_blocks(len(sequence.tokens)) > draft.entries:
                passed.append(sequence)
                break
            if sequence.is_again and self._rest(sequence, self._prefix(sequence)[0]) > self.kv.num_free:  # 4
                passed.append(sequence)
                break
            sequence.slot = self._slots.take()
            length = self._extend(sequence, min(self._match_prefix(sequence, draft), draft.budget), draft)
            if length == 0:
                self._release(sequence)
                passed.append(sequence)
                break
            sequence.is_again = False
            insort(self.running, sequence, key=_rank)
            draft.take(sequence, length, layout.tokens_per_block)
        self.waiting[:0] = passed

    def _has_place(self) -> bool:
        return len(self.running) < self.max_batch_size and self._slots.num_free > 0

    @property
    def has_work(self) -> bool:
        """A step could be made now, memory permitting."""
        for sequence in self.running:  # mostly the first one can: quicker than any()
            if sequence.can_step:
                return True
        return any(not s.num_pending for s in self.waiting)

    def _must_follow(self, sequence: Sequence) -> bool:
        """A request's later choices wait until the first one has computed the prompt that they share."""
        if sequence.params.n == 1:
            return False
        size = self.kv.layout.tokens_per_block
        return any(
            other.request_id == sequence.request_id
            and (not other.is_prompt_computed or other.num_published < (other.prompt_len - 1) // size)
            for other in self.running
        )

    def _match_prefix(self, sequence: Sequence, draft: Draft) -> int:
        """A waiting sequence takes what there is of its prefix; tokens that it should compute next."""
        length = self._find_prefix(sequence, draft)
        if not sequence.is_started:
            self.num_prefix_queries += len(sequence.tokens)
            sequence.num_cached = min(sequence.num_computed, sequence.prompt_len)
            if sequence.choice == 0:
                self.num_looked_up += len(sequence.tokens)
                self.num_found += sequence.num_cached
        return length

    def _find_prefix(self, sequence: Sequence, draft: Draft) -> int:
        """Take published blocks and have others fetched, as far as free blocks reach; tokens left to compute.

        One token at least is left, since its logits are needed, and one free block for it. If it is for want
        of blocks that not all is fetched, one block is computed, and then there may be room for the rest.
        """
        size = self.kv.layout.tokens_per_block
        runs = list(self._runs(sequence))
        if not runs:
            return sequence.num_missing
        self._publish(sequence)
        wanted = len(sequence.blocks) + sum(count for count, _ in runs)
        for count, is_here in runs:
            begin = len(sequence.blocks)
            keys = sequence.keys[begin : begin + count]
            if is_here:
                found = self.kv.match(keys)
            else:
                found = self._fetch(keys[: max(0, self.kv.num_free - 1)], draft)
            sequence.blocks += found
            if len(found) < count:
                break
        if not sequence.is_started:
            self.num_prefix_hits += len(sequence.blocks) * size - sequence.num_computed
        sequence.num_published = len(sequence.blocks)
        sequence.num_computed = sequence.num_published * size
        return sequence.num_missing if sequence.num_published == wanted else size

    def _fetch(self, keys: list[BlockKey], draft: Draft) -> list[BlockId]:
        """Blocks for these keys, published at once: whoever takes them runs behind the copies."""
        blocks = self.kv.allocate(len(keys))
        assert blocks is not None and (self.host is not None or not keys)
        for block, key in zip(blocks, keys, strict=True):
            assert self.host is not None
            self.kv.publish(block, key)
            draft.fetches.append(Fetch(self.host.use(key), block))
        return blocks

    # --- afterwards ----------------------------------------------------------------------------------

    def computed(self, step: Step) -> None:
        """The step has run: publish the blocks that are full of known tokens now.

        A decode's when it has begun the next one, which takes a closer look in any case.
        """
        self.num_changes += 1
        for sequence in step.begun:
            self._publish(sequence)
        for chunk in step.prompts:
            self._publish(chunk.sequence)

    def _publish(self, sequence: Sequence) -> None:
        size = self.kv.layout.tokens_per_block
        num_full = min(sequence.num_computed, len(sequence.tokens)) // size
        sequence.extend_keys(size, num_full)
        for index in range(sequence.num_published, num_full):
            self.kv.publish(sequence.blocks[index], sequence.keys[index])
        sequence.num_published = num_full

    def _preempt(self, sequence: Sequence) -> None:
        self.num_changes += 1
        self._publish(sequence)  # of a step that is queued too: who takes these blocks runs behind it
        self.running.remove(sequence)
        self._release(sequence)
        sequence.is_again = True
        self.num_preemptions += 1
        insort(self.waiting, sequence, key=_rank)

    def keep_found(self) -> None:
        """What the next one would find that begins again is dropped last of all that is cached."""
        sequence = next(iter(self.waiting), None)
        if sequence is not None and sequence.is_again:
            keys = sequence.full_keys(self.kv.layout.tokens_per_block, len(sequence.tokens) - 1)
            self.kv.release(self.kv.match(keys))

    def preempt_youngest(self, count: int) -> int:
        """Take the blocks of the youngest sequences; the full ones are cached until their place is needed.

        Returns how many there were.
        """
        victims = self.running[::-1][:count]
        for victim in victims:
            self._preempt(victim)
        return len(victims)

    def _release(self, sequence: Sequence) -> None:
        self.kv.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.num_published = 0
        sequence.ready_until = 0
        if sequence.slot is not None:
            self._slots.put(sequence.slot)
        sequence.slot = None
        sequence.num_tabled = 0
        sequence.is_token_placed = False

    def rename_blocks(self, moves: tuple[Move, ...]) -> None:
        """Blocks have moved: rewrite the tables that name them."""
        target = dict(moves)
        for sequence in self.running:
            moved = [i for i, block in enumerate(sequence.blocks) if block in target]
            for index in moved:
                sequence.blocks[index] = target[sequence.blocks[index]]
            if moved:
                sequence.num_tabled = min(sequence.num_tabled, moved[0])
                sequence.ready_until = 0

    def check(self) -> None:
        """Each sequence is in one place, with what it needs there; decodes are ready that are said to be."""
        size, sequences = self.kv.layout.tokens_per_block, (*self.running, *self.waiting)
        indexed = [sequence for each in self._by_request.values() for sequence in each]
        assert len(indexed) == len(sequences) and set(indexed) == set(sequences)
        assert all(not s.blocks and s.slot is None and not s.ready_until for s in self.waiting)
        for s in self.running:
            assert s.slot is not None and not s.is_ended
            assert len(s.blocks) == self.kv.layout.num_blocks(s.num_computed)
            if s.num_computed < s.ready_until:
                assert s.num_missing == 1 and s.can_step and s.num_computed < len(s.blocks) * size


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
