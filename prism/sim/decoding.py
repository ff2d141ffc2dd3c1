"""The sequences of a model that draw a token each step, stepped many times at once.

What changes from step to step is linear or periodic: each sequence has one token more, and takes a new block
every `block` steps. So a number of steps is arithmetic on counts, whatever the size of the batch.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import chain

from prism.sim.jobs import Job
from prism.sim.ticks import NEVER


class DecodeGroup:
    """Sequences, and how far they are.

    A sequence that joins at step `s` with `T` tokens known has `T - 1` of them in KV. Its step `s + i` writes
    token `T + i`, whose block is new when `T + i - 1` is a multiple of the block's size.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.context = 0
        """Tokens that the next step reads, of all sequences."""
        self.num_blocks = 0
        """Blocks that they hold, with those that a step on its way writes to."""
        self.size = 0
        """Sequences."""
        self._steps = 0
        """Steps that have run."""
        self._begun = 0
        """Steps that have got their blocks: as many, or one more."""
        self._phases = [0] * block
        self._joined: dict[Job, tuple[int, int, int]] = {}
        """Step at which a sequence joined, its tokens then, and how many had joined before."""
        self._ends: list[tuple[int, int, Job]] = []
        self._num_joins = 0
        self._ahead: dict[Job, int] = {}
        """What each was ahead by when the newest joined; `_gained + min(of it, _most)` since then."""
        self._gained = 0
        self._most = NEVER
        self._least: int | None = None
        """Of `_ahead`; None when one has left that may have been it."""

    def jobs(self) -> list[Job]:
        """All sequences."""
        return list(self._joined)

    def join(self, job: Job, ahead: int = 0) -> None:
        """A sequence whose first token has just been drawn; its next one is due in `ahead` ticks."""
        tokens = job.known
        self._num_joins += 1
        self._joined[job] = (self._steps, tokens, self._num_joins)
        self._settle()
        self._ahead[job] = ahead
        self._least = None
        self.size += 1
        self._phases[(1 - tokens + self._steps) % self.block] += 1
        self.context += tokens
        self.num_blocks += self._blocks(tokens - 1)
        heappush(self._ends, (self._steps + job.output - job.produced, self._num_joins, job))

    def leave(self, job: Job) -> int:
        """Take a sequence out, ended or not; the blocks that it held."""
        step, tokens, _ = self._joined.pop(job)
        if self._ahead.pop(job) == self._least:
            self._least = None
        self.size -= 1
        self._phases[(1 - tokens + step) % self.block] -= 1
        ran = self._steps - step
        job.produced += ran
        self.context -= tokens + ran
        held = self._blocks(tokens + ran - 1)
        if self._begun > self._steps and (tokens + ran - 1) % self.block == 0:
            held += 1
        self.num_blocks -= held
        if len(self._ends) > 2 * self.size + 16:  # those that left early are skipped when they come up
            self._ends = [entry for entry in self._ends if self._is_valid(entry)]
            heapify(self._ends)
        return held

    @property
    def ahead(self) -> int:
        """Ticks from the last step to when the next token of a stream is due, the least of them."""
        if not self._ahead:
            return 0
        if self._least is None:
            self._least = min(self._ahead.values())
        return self._gained + min(self._least, self._most)

    def bank(self, gain: int, most: int) -> None:
        """Steps have put each stream `gain` ticks ahead, and before at most `most` of what it was."""
        self._most = min(self._most, most - self._gained)
        self._gained += gain

    def _settle(self) -> None:
        """Write down what each is ahead by."""
        gained, most = self._gained, self._most
        self._ahead = {job: gained + min(ahead, most) for job, ahead in self._ahead.items()}
        self._gained, self._most, self._least = 0, NEVER, None

    def youngest(self) -> Job | None:
        """The one that gives way first."""
        return max(self._joined, key=lambda job: job.rank, default=None)

    def wanting(self) -> list[Job]:
        """Sequences whose next step takes a new block."""
        phase = self._begun % self.block
        return [
            job
            for job, (step, tokens, _) in self._joined.items()
            if (1 - tokens + step) % self.block == phase
        ]

    def held(self) -> list[tuple[Job, int]]:
        """Sequences, and the blocks that each holds; while no step is on its way."""
        return [
            (job, self._blocks(tokens + self._steps - step - 1))
            for job, (step, tokens, _) in self._joined.items()
        ]

    def steps_to_end(self) -> int:
        """Steps until the first sequence ends."""
        while self._ends and not self._is_valid(self._ends[0]):
            heappop(self._ends)
        return self._ends[0][0] - self._steps

    @property
    def goes_on(self) -> bool:
        """There are sequences, and none has ended."""
        return self.size > 0 and self.steps_to_end() > 0

    def _is_valid(self, entry: tuple[int, int, Job]) -> bool:
        """Not of one that has left since."""
        joined = self._joined.get(entry[2])
        return joined is not None and joined[2] == entry[1]

    def blocks_for(self, count: int) -> int:
        """New blocks that the next `count` steps take."""
        phases, place = self._phases, self._begun % self.block
        if count == 1:
            return phases[place]
        cycles, rest = divmod(count, self.block)
        end = place + rest
        partial = sum(phases[place:end])
        if end > self.block:
            partial += sum(phases[: end - self.block])
        return cycles * self.size + partial

    def most_blocks_for(self, count: int) -> int:
        """No fewer than so many steps take, quickly."""
        return (count // self.block + 1) * self.size

    def steps_within(self, blocks: int) -> int:
        """Most steps that take no more than so many new blocks."""
        cycles, left = divmod(blocks, self.size)
        count = cycles * self.block
        place = self._begun % self.block
        for phase in chain(self._phases[place:], self._phases):
            left -= phase
            if left < 0:
                break
            count += 1
        return count

    def begin(self, count: int) -> None:
        """So many more steps get their blocks."""
        self.num_blocks += self.blocks_for(count)
        self._begun += count

    def forgo(self) -> None:
        """A step that was begun is not run after all."""
        self._begun -= 1
        assert self._begun >= self._steps
        self.num_blocks -= self._phases[self._begun % self.block]

    def run(self, count: int) -> None:
        """So many of the begun steps have run."""
        self._steps += count
        assert self._steps <= self._begun
        self.context += count * self.size

    def ended(self) -> list[Job]:
        """Sequences that have drawn their last token, in order of arrival."""
        found = []
        while self._ends and (self._ends[0][0] <= self._steps or not self._is_valid(self._ends[0])):
            entry = heappop(self._ends)
            if self._is_valid(entry):
                found.append(entry[2])
        return found if len(found) < 2 else sorted(found, key=lambda job: job.rank)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)
