"""What a lane is doing, and what of it has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from prism.sim.jobs import Chunk, Job
from prism.sim.memory import Memory
from prism.sim.model import SimModel
from prism.sim.overlap import Pulls
from prism.sim.rounds import Rounds
from prism.sim.ticks import NEVER
from prism.sim.usage import Gaps
from prism.worker.foresight import BANKED


@dataclass(slots=True)
class Run:
    """What a lane is doing."""

    rounds: Rounds[SimModel]
    others: Pulls = ()
    """What decodes on other lanes, as its steps' times assume."""
    chunks: Sequence[Chunk] = ()
    """Of prompts: such a step has the device to itself, and is one."""
    has_decodes: bool = True
    turn_before: int = 0
    """When the first member had its turn before."""
    gone: frozenset[SimModel] = frozenset()
    """Members that have lost their memory meanwhile."""
    promised: int = 0
    """Free slabs that its steps, of one model, may take on their way."""
    limit: int = NEVER
    """Steps after which it takes the next one."""


class Leaving(NamedTuple):
    """A request whose last token a step on its way draws. It keeps its place and its blocks until then."""

    end: int
    model: SimModel
    job: Job
    blocks: int


class Listener(Protocol):
    """Who hears of tokens."""

    def drawn(self, job: Job, end: int) -> None:
        """A prompt has been computed, and a token is drawn then."""
        ...

    def completed(self, job: Job, end: int) -> None:
        """The last token is drawn then, which is now or after all that is to come of it."""
        ...

    def prompts_ran(self) -> None:
        """Engines hold less of prompts."""
        ...


def advance(run: Run, now: int, memory: Memory) -> None:
    """Account for the decode steps of a run that have closed; those that were chosen get their blocks."""
    rounds = run.rounds
    if now < rounds.stands_until:
        return
    closed, begun = rounds.progress(now)
    begun = max(begun, rounds.begun)
    if closed > rounds.done or begun > rounds.begun:
        for index, part in enumerate(rounds.parts):
            if not run.gone or part.who not in run.gone:
                _advance(run, index, closed, begun, memory)
    rounds.account(closed, begun)


def _advance(run: Run, index: int, closed: int, begun: int, memory: Memory) -> None:
    """One member's steps among the first `closed` and `begun`."""
    rounds = run.rounds
    model = rounds.parts[index].who
    starts = rounds.steps_of(index, begun) - rounds.steps_of(index, rounds.begun)
    if starts:
        if begun > run.limit:
            starts -= _grow(run, model, begun, memory)
        model.decodes.begin(starts)
        model.last_turn = rounds.end_of(rounds.last_of(index, begun))
    before = rounds.steps_of(index, rounds.done)
    ends = rounds.steps_of(index, closed) - before
    if ends:
        model.decodes.run(ends)
        model.usage.decoded_tokens += ends * model.decodes.size
        steps = rounds.series_of(index, before, ends)
        gaps = rounds.gaps_of(index, before, ends, model.last_end)
        model.usage.ran_decodes(steps, None if model.has_waiting else gaps, len(run.others) + 1)
        _bank(model, gaps)
        model.last_end = model.last_used = model.last_end + gaps.total(ends)


def _bank(model: SimModel, gaps: Gaps) -> None:
    """Count what steps have put the streams ahead of their objective, `BANKED` tokens at most.

    One step after the other it is `ahead = min(ahead + tpot - (end - end before), most)`. With `gain(j)`,
    what the first `j` steps gain without that bound, all of them come to
    `gain(all) + min(ahead, most - max gain)`.
    """
    tpot = model.tpot
    if not gaps.rest.num:
        gain = most = tpot - gaps.first
    else:
        gain, most = gaps.gain(gaps.num, tpot), gaps.gain(gaps.peak(tpot), tpot)
    model.decodes.bank(gain, BANKED * tpot - most)


def due_after(model: SimModel, rounds: Rounds[SimModel]) -> Callable[[int], int]:
    """When the first stream of a model is due after so many of its steps on end; see `_bank`."""
    tpot, ahead, most = model.tpot, model.decodes.ahead, BANKED * model.tpot
    gaps = rounds.gaps_of(0, 0, rounds.num_steps, model.last_end)
    peak = gaps.peak(tpot)
    return lambda steps: model.last_end + steps * tpot + min(ahead, most - gaps.gain(min(steps, peak), tpot))


def steps_alone(model: SimModel, memory: Memory) -> int:
    """Steps until a sequence ends, or there is no room for the next one; the first one has its blocks."""
    decodes, free = model.decodes, model.free_blocks
    to_end = decodes.steps_to_end()
    if free >= decodes.most_blocks_for(to_end):
        return to_end
    steps = decodes.steps_within(free) + 1
    if steps < to_end and (spare := memory.spare(model)):
        steps = decodes.steps_within(free + spare * model.blocks_per_slab) + 1
    return min(steps, to_end)


def promise(run: Run, memory: Memory) -> None:
    """The free slabs that it takes on its way, if it does, are promised to it; it has one member."""
    rounds = run.rounds
    model, more = rounds.parts[0].who, rounds.num_steps - 1
    free = model.free_blocks
    if free >= model.decodes.most_blocks_for(more):
        return
    lacking = model.decodes.blocks_for(more) - free
    if lacking > 0:
        run.limit = 1 + model.decodes.steps_within(free)
        run.promised = -(-lacking // model.blocks_per_slab)
        memory.promised += run.promised


def _grow(run: Run, model: SimModel, begun: int, memory: Memory) -> int:
    """Begin the steps up to the last one that takes a slab; how many."""
    before = run.rounds.begun
    begins = before
    while begun > run.limit:
        model.decodes.begin(run.limit + 1 - begins)
        begins = run.limit + 1
        run.promised -= memory.grow(model)
        run.limit = begins + model.decodes.steps_within(model.free_blocks)
    return begins - before


def stop_growing(run: Run, memory: Memory) -> None:
    """It takes no more slabs, and ends before it would."""
    run.rounds.shorten(run.limit)
    give_back(run, memory)


def fit(run: Run, model: SimModel) -> None:
    """It ends before the model, if it is one of its members, lacks a block."""
    rounds = run.rounds
    size = len(rounds.parts)
    for index, part in enumerate(rounds.parts):
        if part.who is model and model.decodes.size:
            within = rounds.steps_of(index, rounds.begun) + model.decodes.steps_within(model.free_blocks)
            rounds.shorten(max(rounds.begun, within * size + index))


def give_back(run: Run, memory: Memory) -> None:
    """What was promised to a run that ends before it takes it, or does not take it."""
    memory.promised -= run.promised
    run.promised, run.limit = 0, NEVER


def steps_until_change(order: Sequence[SimModel]) -> int:
    """Steps until a sequence ends, or a model lacks blocks for its next step."""
    size = len(order)
    limits = []
    for index, model in enumerate(order):
        limits.append((model.decodes.steps_to_end() - 1) * size + index + 1)
        has_begun = 1 if index == 0 else 0
        limits.append((model.decodes.steps_within(model.free_blocks) + has_begun) * size + index)
    return min(limits)


def close(run: Run, listener: Listener) -> list[Leaving]:
    """Its last step counts as run: tell what is drawn, and take out who is done when it has."""
    end = run.rounds.end
    leaving: list[Leaving] = []
    for part in run.rounds.parts:
        model = part.who
        if model in run.gone:
            continue
        if run.chunks:
            leaving += _close_prompts(model, run, listener)
        for job in model.decodes.ended():
            leaving.append(Leaving(end, model, job, model.decodes.leave(job)))
    return leaving


def _close_prompts(model: SimModel, run: Run, listener: Listener) -> Iterator[Leaving]:
    end = run.rounds.end
    if run.has_decodes:
        model.decodes.run(1)
        model.usage.decoded_tokens += model.decodes.size
        gain = model.tpot - (end - model.last_end)
        model.decodes.bank(gain, BANKED * model.tpot - gain)
    model.last_end = model.last_used = end
    model.usage.ran_prompts(run.rounds.end - run.rounds.start)
    for chunk in run.chunks:
        job = chunk.job
        if chunk.num_restarts != job.num_restarts or job.missing:
            continue
        blocks = model.layout.num_blocks(job.computed)
        model.prompts.remove(job)
        model.prompt_blocks -= blocks
        job.produced += 1
        model.usage.decoded_tokens += 1
        listener.drawn(job, end)
        if job.produced < job.output:
            model.decodes.join(job, model.tpot)
        else:
            yield Leaving(end, model, job, blocks)
