"""A model on a simulated device: what it holds, and its engine's queue.

Mirrors `engine/scheduler.py` with counts in place of blocks: running sequences first, then waiting ones as
far as budget, batch and blocks reach; the youngest gives way. Prefix caches are left out.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from operator import attrgetter

from prism.engine.kv_layout import KvLayout, layout_of
from prism.engine.scheduler import Want
from prism.errors import ConfigError
from prism.messages import ModelReport
from prism.sim.decoding import DecodeGroup
from prism.sim.jobs import Chunk, Job, Served, policy_rank
from prism.sim.ticks import StepTicks, to_seconds, to_ticks
from prism.sim.usage import Usage
from prism.types import Bytes, ModelState, RequestId
from prism.worker.foresight import GROWTH, IdleTimes, OutputLengths
from prism.worker.usage import is_hopeful

_rank = attrgetter("rank")


class SimModel:
    """One model of one device."""

    def __init__(self, served: Served, slab_bytes: int) -> None:
        layout = layout_of(served.costs.shape.kv_bytes_per_token, Bytes(slab_bytes))
        if layout is None:
            raise ConfigError([f"model {served.model}: a block of KV does not fit a slab of {slab_bytes}"])
        self.name = served.model
        """Its key in the trace."""
        self.served = served
        self.layout: KvLayout = layout
        self.blocks_per_slab = layout.blocks_per_slab
        self.tpot = to_ticks(served.slo.tpot)
        self.lane: int | None = None
        """Since it was first loaded."""
        self.weight_slabs = served.weight_slabs(slab_bytes)
        self.kv_limit: int | None = None
        self.is_pinned = False
        self.is_wanted = False
        """It was told to load, whether or not there are requests."""
        self.is_at_home = False
        """It lives here, as the controller has said."""
        self.is_ahead = False
        """It is in memory, or on its way there, though nobody has asked for it since it was not."""
        self.is_open = True
        """It takes more requests."""
        self.state = ModelState.COLD
        self.kv_slabs = 0
        self.tickets: dict[RequestId, Job] = {}
        """Its requests that have not ended, in order of arrival."""
        self.decodes = DecodeGroup(layout.tokens_per_block)
        self.prompts: list[Job] = []
        """Running, not all of the prompt computed."""
        self.waiting: list[Job] = []
        """Admitted, without blocks."""
        self.prompt_blocks = 0
        self.num_leaving = 0
        """Sequences whose last token is on its way."""
        self.leaving_blocks = 0
        self.is_stalled = False
        """Its last turn found no memory."""
        self.last_turn = 0
        """When its last step began: two may be chosen at the same tick, and begin one after the other."""
        self.last_end = 0
        self.last_used = 0
        self.idle_times = IdleTimes()
        self.output_lengths = OutputLengths()
        self.active_since = 0
        self.num_activations = 0
        self.num_ahead = 0
        """Of the activations, those before anybody asked."""
        self.num_evictions = 0
        self.num_preemptions = 0
        self.usage = Usage(self.tpot)
        self.idle_report: tuple[tuple[object, ...], ModelReport] | None = None
        """The last one that was told again while it had nothing to do, with its history until then."""
        self._ticks = StepTicks(served.costs.steps)
        self.num_layers = served.costs.shape.num_layers

    @property
    def is_active(self) -> bool:
        """It can run steps."""
        return self.state is ModelState.ACTIVE

    def history(self) -> tuple[object, ...]:
        """While it has no requests: another one whenever something else is to be reported of it."""
        usage = self.usage
        return (
            self.state,
            self.is_ahead,
            self.kv_slabs,
            self.last_used,
            self.num_activations,
            usage.num_requests,
            usage.num_late,
            usage.num_parts,
        )

    # --- memory ---------------------------------------------------------------------------------------

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences hold."""
        return self.decodes.num_blocks + self.prompt_blocks + self.leaving_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks of its slabs that nobody holds."""
        used = self.decodes.num_blocks + self.prompt_blocks + self.leaving_blocks
        return self.kv_slabs * self.blocks_per_slab - used

    @property
    def empty_slabs(self) -> int:
        """Slabs that compaction could free."""
        return self.kv_slabs - -(-self.used_blocks // self.blocks_per_slab)

    def capacity(self, num_slabs: int) -> int:
        """Tokens that so many slabs hold."""
        return num_slabs * self.blocks_per_slab * self.layout.tokens_per_block

    def return_chance(self, now: int, threshold: float | None) -> float:
        """That it gets a request soon, if it has none."""
        return self.idle_times.return_chance(to_seconds(now - self.last_used), threshold)

    @property
    def due(self) -> int:
        """When the next token of its streams is, the first of them; there is one at least."""
        return self.last_end + self.decodes.ahead

    # --- the queue ------------------------------------------------------------------------------------

    @property
    def num_sequences(self) -> int:
        """Admitted and not ended."""
        return self.decodes.size + len(self.prompts) + self.num_leaving + len(self.waiting)

    @property
    def num_running(self) -> int:
        """Of the batch's places, those that are taken."""
        return self.decodes.size + len(self.prompts) + self.num_leaving

    @property
    def has_waiting(self) -> bool:
        """A request of it has not been admitted."""
        return len(self.tickets) > self.num_sequences

    @property
    def can_step(self) -> bool:
        """It could take a turn."""
        return bool(able_to_step([self]))

    def take(self, job: Job) -> None:
        """A request of it has come; one that another device had may be older than others."""
        youngest = next(reversed(self.tickets.values()), None)
        self.tickets[job.request_id] = job
        if youngest is not None and youngest.rank > job.rank:
            self.tickets = {each.request_id: each for each in sorted(self.tickets.values(), key=_rank)}

    def is_hopeful(self, job: Job) -> bool:
        """A request that comes now could well have its first token in time."""
        if not self.is_active or job.is_started:
            return False
        return is_hopeful(self.served.costs.steps.prefill(job.prompt), self.served.slo.ttft)

    def first_token(self, job: Job, now: int) -> None:
        """It is drawn, or never will be: that may be late for want of the device."""
        self.usage.num_late += job.is_hopeful and now > job.arrival + to_ticks(self.served.slo.ttft)

    def oldest(self) -> Job | None:
        """Its first request, waiting or running."""
        return next(iter(self.tickets.values()), None)

    def youngest_running(self) -> Job | None:
        """The sequence with blocks that gives way first."""
        youngest = self.decodes.youngest()
        if self.prompts and (youngest is None or self.prompts[-1].rank > youngest.rank):
            return self.prompts[-1]
        return youngest

    def unstarted(self) -> list[Job]:
        """Sequences with prompts to compute, in the order in which steps take them."""
        return self.prompts + self.waiting

    def admit(self, job: Job) -> None:
        """A request enters."""
        insort(self.waiting, job, key=_rank)

    def preempt(self, job: Job) -> None:
        """A running sequence gives its blocks back and starts again later."""
        self._drop(job)
        job.is_again = True
        self.num_preemptions += 1
        insort(self.waiting, job, key=_rank)

    def cancel(self, job: Job) -> None:
        """An admitted request leaves for good."""
        if job in self.waiting:
            self.waiting.remove(job)
        else:
            self._drop(job)

    def _drop(self, job: Job) -> None:
        if job in self.prompts:
            self.prompts.remove(job)
            self.prompt_blocks -= self.layout.num_blocks(job.computed)
        else:
            self.decodes.leave(job)
        job.computed = 0
        job.num_restarts += 1

    def suspend(self) -> list[Job]:
        """Everything admitted leaves: the model loses its memory."""
        for job in [*self.decodes.jobs(), *self.prompts]:
            self._drop(job)
            insort(self.waiting, job, key=_rank)
        leaving, self.waiting = self.waiting, []
        for job in leaving:
            job.is_again = False
        self.decodes = DecodeGroup(self.layout.tokens_per_block)
        assert self.prompt_blocks == 0
        self.is_stalled = False
        return leaving

    # --- a step with prompts --------------------------------------------------------------------------

    def running(self) -> list[tuple[Job, int]]:
        """Sequences with blocks, and how many each holds, oldest first."""
        prompts = [(job, self.layout.num_blocks(job.computed)) for job in self.prompts]
        return sorted([*self.decodes.held(), *prompts], key=lambda item: item[0].rank)

    def next_due(self, job: Job) -> int:
        """When a running sequence's next token is."""
        return job.due if job.first_token is None else self.last_end + self.tpot

    @property
    def expected_growth(self) -> int:
        """Tokens of output that memory is kept for, of each sequence."""
        return max(1, round(GROWTH * self.output_lengths.expected_rest))

    def blocks_to_come(self) -> int:
        """Blocks that the requests in the engine are expected to need beyond those that they have."""
        growth, num_blocks = self.expected_growth, self.layout.num_blocks
        prompts = sum(num_blocks(j.known + growth) - num_blocks(j.computed) for j in self.unstarted())
        return prompts + self.decodes.size * num_blocks(growth)

    def blocks_wanted(self, budget: int, max_sequences: int) -> int:
        """Free blocks that a step of `budget` tokens could use."""
        prompts = [num_blocks for _, num_blocks in self._prompts_want(budget, max_sequences)]
        return self.decodes.blocks_for(1) + sum(prompts)

    def wants(self, budget: int, max_sequences: int) -> list[Want]:
        """The same by sequence: running ones oldest first, then waiting ones."""
        decodes = [Want(policy_rank(job), 1) for job in self.decodes.wanting()]
        prompts = [
            Want(policy_rank(job), num, job.is_again)
            for job, num in self._prompts_want(budget, max_sequences)
        ]
        return [*sorted(decodes), *prompts]

    def _prompts_want(self, budget: int, max_sequences: int) -> Iterator[tuple[Job, int]]:
        budget -= self.decodes.size
        num_blocks = self.layout.num_blocks
        places = max_sequences - self.num_running
        for job in self.unstarted():
            if budget <= 0 or (not job.computed and places <= 0 and job not in self.prompts):
                break
            length = min(job.missing, budget)
            budget -= length
            whole = job.known + 1 if job.is_again else job.computed + length
            wanted = num_blocks(whole) - num_blocks(job.computed)
            if wanted:
                yield job, wanted

    def take_chunks(self, budget: int, max_sequences: int) -> list[Chunk]:
        """The prompts' part of a step whose decodes have their blocks already."""
        chunks: list[Chunk] = []
        budget -= self.decodes.size
        for job in list(self.prompts):
            if budget <= 0:
                break
            if not job.num_restarts or job in self.prompts:  # else it gave way to one before it
                budget -= self._take(job, budget, chunks, may_preempt=True)
        while self.waiting and budget > 0 and self.num_running < max_sequences:
            job = self.waiting[0]
            if job.is_again and not self._fits(job):
                break
            taken = self._take(job, budget, chunks, may_preempt=False)
            if not taken:
                break
            self.waiting.pop(0)
            insort(self.prompts, job, key=_rank)
            budget -= taken
        self.usage.starting([chunk.job for chunk in chunks])
        return chunks

    def _take(self, job: Job, budget: int, chunks: list[Chunk], *, may_preempt: bool) -> int:
        """The next chunk of a prompt, as long as budget and blocks allow; its length."""
        size = self.layout.tokens_per_block
        held = self.layout.num_blocks(job.computed)
        length = min(job.missing, budget, (held + self.free_blocks) * size - job.computed)
        while length <= 0 and may_preempt and self.youngest_running() is not job:
            self._preempt_youngest()
            length = min(job.missing, budget, (held + self.free_blocks) * size - job.computed)
        if length <= 0:
            return 0
        job.computed += length
        job.is_again = False
        self.prompt_blocks += self.layout.num_blocks(job.computed) - held
        chunks.append(Chunk(job, length, job.num_restarts))
        return length

    def _fits(self, job: Job) -> bool:
        """There are blocks for all that one which gave way had, and for a token more.

        The server counts what it would find in the prefix cache; there is none here.
        """
        return self.layout.num_blocks(job.known + 1) <= self.free_blocks

    def make_room_for_decodes(self) -> bool:
        """Sequences give way, youngest first, until the others' next step has its blocks.

        The last one keeps what it has: the server would find it in the prefix cache.
        """
        while self.decodes.size and self.decodes.blocks_for(1) > self.free_blocks:
            if self.decodes.size + len(self.prompts) == 1:
                return False
            self._preempt_youngest()
        return True

    def _preempt_youngest(self) -> Job:
        victim = self.youngest_running()
        assert victim is not None
        self.preempt(victim)
        return victim

    # --- costs ----------------------------------------------------------------------------------------

    def decode_ticks(self, longer: float) -> tuple[int, int]:
        """Ticks of the next decode step, and by how much each following one is longer; see `StepTicks`."""
        return self._ticks.decode(self.decodes.size, self.decodes.context, longer)

    @property
    def kernel_seconds(self) -> float:
        """Of a decode step without context, for each layer."""
        return self._ticks.gemm(self.decodes.size) / self.num_layers

    def decode_seconds(self, more: int = 0) -> float:
        """Of a decode step alone, when each sequence has so many tokens more."""
        size = self.decodes.size
        return self._ticks.seconds(size, self.decodes.context + more * size)

    def chunk_ticks(self, chunks: list[Chunk]) -> int:
        """Ticks of a step of these chunks and all decodes."""
        tokens = self.decodes.size + sum([chunk.length for chunk in chunks])
        pairs = sum([c.length * (c.job.computed - c.length / 2) for c in chunks])
        return to_ticks(self.served.costs.steps.step(tokens, pairs, self.decodes.context))


def able_to_step(models: Iterable[SimModel]) -> list[SimModel]:
    """Those that could take a turn; asked for at each event, and most have nothing to do."""
    return [
        model
        for model in models
        if (model.decodes.size or model.prompts or model.waiting)
        and model.state is ModelState.ACTIVE
        and not model.is_stalled
    ]
