"""The lanes of a simulated device: what runs on them, and until when nothing about it can change.

Mirrors `worker/stepper.py`: each lane that has room asks `worker/turns.py` for its next step; decodes of
several lanes overlap; a step with prompts begins when what the others have queued has run, and what they
queue later waits for its end.

Where steps are queued ahead the next one is chosen when the present one is about to end. So what models hold
is ahead of the clock by so much: a step counts as run, `last_end` and all, as soon as the next one may be
chosen (it closes, `rounds.py`). Only its requests' ends come when it has run in fact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from prism.modes import Rules
from prism.sim.jobs import Chunk
from prism.sim.jumps import Chosen, Jumps
from prism.sim.lanes import Lanes, have_prompts
from prism.sim.memory import Memory
from prism.sim.model import SimModel
from prism.sim.modes import Limits
from prism.sim.overlap import Longer, Pulls, pulls_of_others
from prism.sim.rounds import Part, Rounds
from prism.sim.runs import Leaving, Listener, Run, advance, close, fit, give_back, promise, stop_growing
from prism.sim.ticks import NEVER


class Stepper:
    """All lanes of one device."""

    def __init__(
        self,
        memory: Memory,
        rules: Rules,
        limits: Limits,
        together: Callable[[int], float],
        listener: Listener,
    ) -> None:
        self.lanes = Lanes(rules, limits, together)
        self._runs: list[Run | None] = [None] * limits.num_lanes
        self._decided = [0] * limits.num_lanes
        self._ends = [0] * limits.num_lanes
        """When the last step of each lane that has closed has run."""
        self._prompt_ends = [0] * limits.num_lanes
        """The same of steps with prompts."""
        self._coming: list[tuple[int, int, Leaving | None]] = []
        """Ends of requests that are on their way, and of steps with prompts."""
        self._numbers = count()
        self._memory = memory
        self._limits = limits
        self._jumps = Jumps(rules, limits, memory)
        self._listener = listener
        self._has_emptied = False
        """A lane has lost what it was to do, or has room for more."""
        self._is_settled = False
        """Nothing has run, come or changed for any model since lanes were last given something to do."""
        self._stalled: list[SimModel] = []
        """Models that have lacked memory since memory changed; those that have left meanwhile lack none."""
        self.busy = 0
        """Ticks in which lanes worked, of all lanes."""

    def account(self, now: int) -> None:
        """Bring counters up to date. Nothing else changes by it."""
        for run in self._runs:
            if run is not None and not run.chunks:
                advance(run, now, self._memory)

    def next_close(self) -> int:
        """When the next run closes."""
        end = NEVER
        for run in self._runs:
            if run is not None and run.rounds.closes < end:
                end = run.rounds.closes
        return end

    def next_coming(self) -> int:
        """When a request ends next whose last step has closed, or prompts have run."""
        return self._coming[0][0] if self._coming else NEVER

    def skip_prompts(self, now: int) -> bool:
        """Nobody waits for the engines: prompts that have run then, and nothing else, are of no interest."""
        coming = self._coming
        if any(each[0] <= now and each[2] is not None for each in coming):
            return False
        while coming and coming[0][0] <= now:
            heappop(coming)
        return True

    @property
    def has_stalled(self) -> bool:
        """Some model lacks memory for its next step."""
        return bool(self._stalled) and any(model.is_stalled for model in self._stalled)

    def wake(self, now: int) -> None:
        """Memory has changed: who lacked it tries again."""
        for model in self._stalled:
            if model.is_stalled:
                model.is_stalled = False
                self.disturb(model, now)
        self._stalled.clear()

    # --- what has run -----------------------------------------------------------------------------------

    def sync(self, now: int) -> None:
        """Account for the steps that have closed and were chosen by now.

        A lane whose step closes just now decides anew, as all lanes do whose steps close now.
        """
        for run in self._runs:
            if run is not None and not run.chunks:
                if now >= run.rounds.stands_until:
                    advance(run, now, self._memory)
                if run.rounds.is_closing:
                    run.rounds.cut(now)
                    give_back(run, self._memory)

    def collect(self, now: int) -> None:
        """Close the runs that are due, and tell what has come."""
        self._close_due(now)
        while self._coming and self._coming[0][0] <= now:
            leaving = heappop(self._coming)[2]
            if leaving is None:
                self._listener.prompts_ran()
            else:
                self._leaves(leaving)

    def _close_due(self, now: int) -> None:
        for lane, run in enumerate(self._runs):
            if run is None or run.rounds.closes > now:
                continue
            self._has_emptied, self._is_settled = True, False
            if run.chunks:
                heappush(self._coming, (run.rounds.end, next(self._numbers), None))
            else:
                advance(run, now, self._memory)
                self._decided[lane] = run.rounds.decided_at(run.rounds.num_steps - 1)
            self._retire(lane, run)
            for leaving in close(run, self._listener):
                leaving.model.num_leaving += 1
                leaving.model.leaving_blocks += leaving.blocks
                heappush(self._coming, (leaving.end, next(self._numbers), leaving))

    def _retire(self, lane: int, run: Run) -> None:
        """It has closed."""
        rounds = run.rounds
        give_back(run, self._memory)
        self._runs[lane] = None
        self._ends[lane] = rounds.end
        self.busy += rounds.end - rounds.start

    def _leaves(self, leaving: Leaving) -> None:
        leaving.model.num_leaving -= 1
        leaving.model.leaving_blocks -= leaving.blocks
        self._listener.completed(leaving.job, leaving.end)

    # --- what comes next --------------------------------------------------------------------------------

    def go_on(self, now: int) -> bool:
        """Of all that could happen now only a run of decode steps closes: its lane goes on to decode.

        Nothing ends by it, the same models decode as before, and what memory it takes is free: so nobody else
        is concerned. False if it is otherwise; then nothing has been done.
        """
        (lane, run), *more = [(i, r) for i, r in enumerate(self._runs) if r and r.rounds.closes <= now]
        if more or run.chunks or run.gone:
            return False
        members = self.lanes.able(lane)
        if have_prompts(members):
            return False
        advance(run, now, self._memory)
        if not all(part.who.decodes.goes_on for part in run.rounds.parts):
            return False
        others = self.lanes.others(lane)
        longer = self.lanes.beside(others)
        model = self._jumps.next_to_decode(members, longer, now)
        if model is None or not self._has_blocks(model, now):
            return False
        self._retire(lane, run)
        self._decided[lane] = now
        model.decodes.begin(1)
        self._jump(Chosen(model, now), lane, members, others, longer)
        return True

    def _has_blocks(self, model: SimModel, now: int) -> bool:
        """For its next step, without taking any from anybody: other lanes have not been accounted for."""
        wanted = model.decodes.blocks_for(1)
        memory = self._memory
        return wanted <= model.free_blocks or bool(
            wanted and memory.take_free(model, wanted, now, left=memory.promised)
        )

    def plan(self, now: int) -> None:
        """Give each lane that has room something to do, until all agree on what decodes side by side."""
        if self._is_settled:
            return
        self._is_settled = True
        while True:
            self._has_emptied = False
            idle = self._idle()
            for lane, members in idle:
                self._plan(lane, members if len(idle) == 1 else self.lanes.able(lane), now)
            self._cut_beside_others(now)
            self._close_due(now)
            if not self._has_emptied:
                return

    def _cut_beside_others(self, now: int) -> None:
        """Runs whose steps take longer or shorter than they were planned to."""
        runs = [(lane, run) for lane, run in enumerate(self._runs) if run is not None and not run.chunks]
        if not runs:
            return
        pulls = self.lanes.pulls() if len(runs) > 1 else []
        for lane, run in runs:
            if run.others != (pulls_of_others(pulls, lane) if pulls else self.lanes.others(lane)):
                self._cut(lane, now)

    def _idle(self) -> list[tuple[int, list[SimModel]]]:
        """Lanes that have room, and models that could use it, who decided longest ago first.

        A lane has room, too, when what it was to do is cut before it was due: then what decodes beside it is
        another, or memory is.
        """
        idle = []
        for lane, run in enumerate(self._runs):
            if run is None and (members := self.lanes.able(lane)):
                idle.append((lane, members))
        return idle if len(idle) < 2 else sorted(idle, key=lambda each: (self._decided[each[0]], each[0]))

    def disturb(self, model: SimModel, now: int) -> None:
        """Something about a model has changed: its lane decides anew after what has been chosen.

        A step that was chosen just now has its blocks and stays: else two models could take an empty slab
        from each other for ever.
        """
        self._is_settled = False
        if model.lane is not None:
            self._cut(model.lane, now, at_least=1)

    def remove(self, model: SimModel, now: int) -> None:
        """The model loses its memory; what a step draws that has not closed is lost.

        The server waits for its steps: what they end has ended.
        """
        self._is_settled = False
        if model.lane is None:
            return
        self._cut(model.lane, now)
        run = self._runs[model.lane]
        if run is not None:
            run.gone |= {model}
        if model.num_leaving:
            ending = [each[2] for each in sorted(self._coming) if each[2] and each[2].model is model]
            self._coming = [each for each in self._coming if not each[2] or each[2].model is not model]
            heapify(self._coming)
            for leaving in ending:
                self._leaves(leaving)

    def stop_growing(self, model: SimModel | None, now: int) -> None:
        """Runs, or that of one model, take no more slabs on their way."""
        for run in self._runs:
            if run is not None and run.limit < NEVER and model in (None, run.rounds.parts[0].who):
                advance(run, now, self._memory)
                stop_growing(run, self._memory)

    def has_shrunk(self, model: SimModel, now: int) -> None:
        """The run that the model takes part in goes no further than its free blocks last."""
        run = None if model.lane is None else self._runs[model.lane]
        if run is not None and not run.chunks and model not in run.gone:
            advance(run, now, self._memory)
            fit(run, model)

    def _cut(self, lane: int, now: int, at_least: int = 0) -> None:
        run = self._runs[lane]
        if run is None or run.chunks:
            return
        advance(run, now, self._memory)
        run.rounds.cut(now, at_least)
        give_back(run, self._memory)
        if run.rounds.num_steps == 0:
            model = run.rounds.parts[0].who
            if model not in run.gone:
                model.decodes.forgo()
            model.last_turn = run.turn_before
            self._runs[lane] = None
            self._has_emptied, self._is_settled = True, False

    def _plan(self, lane: int, members: Sequence[SimModel], now: int) -> None:
        """One decision of the policy, and steps as long as it would decide the same."""
        while members:
            model, budget = self.lanes.turn(lane, members, now)
            self._decided[lane] = now
            if self._start(model, budget, lane, now):
                return
            model.is_stalled = True  # for want of memory; the others' turn
            self._stalled.append(model)
            members = self.lanes.able(lane)

    def _start(self, model: SimModel, budget: int, lane: int, now: int) -> bool:
        """Begin a step; False if there is no memory for any of it."""
        size = self._limits.max_batch_size
        has_prompts = bool(model.prompts or model.waiting)
        wanted = model.blocks_wanted(budget, size) if has_prompts else model.decodes.blocks_for(1)
        if wanted > model.free_blocks and not (wanted and self._memory.take_free(model, wanted, now)):
            self._memory.ensure_kv(model, model.wants(budget, size), now)
            if not model.make_room_for_decodes():
                return False
        has_decodes = model.decodes.size > 0
        if has_decodes:
            model.decodes.begin(1)
        chunks = model.take_chunks(budget, size) if has_prompts else []
        if chunks:
            self._start_prompts(model, chunks, has_decodes, lane, now)
        elif model.decodes.size:
            self._start_decodes(model, lane, now)
        else:
            if has_decodes:
                model.decodes.forgo()
            return False
        return True

    def _start_prompts(
        self, model: SimModel, chunks: list[Chunk], has_decodes: bool, lane: int, now: int
    ) -> None:
        """Behind all that the lanes have queued; behind it the lane queues nothing while others decode."""
        start = max(now, self._ends[lane])
        for other, run in enumerate(self._runs):
            if run is not None:
                self._cut(other, now, at_least=1)
            start = max(start, self._ends[other] if run is None else run.rounds.end)
        is_ahead = self._limits.is_queueing and not self.lanes.are_others_decoding(lane)
        part = Part(model, model.chunk_ticks(chunks), 0)
        rounds = Rounds([part], start, 1, now, is_ahead=is_ahead)
        self._prompt_ends[lane] = rounds.end
        self._runs[lane] = Run(rounds, (), chunks, has_decodes)
        model.last_turn = start

    def _start_decodes(self, model: SimModel, lane: int, now: int) -> None:
        others = self.lanes.others(lane)
        members = self.lanes.able(lane)
        longer = self.lanes.beside(others)
        is_single = have_prompts(members) or self._jumps.gives_up(members, longer)
        self._jump(Chosen(model, now, is_single), lane, members, others, longer)

    def _jump(
        self, chosen: Chosen, lane: int, members: Sequence[SimModel], others: Pulls, longer: Longer
    ) -> None:
        """Decode steps, the first of which has its blocks."""
        start = max(chosen.time, self._ends[lane])
        for other, end in enumerate(self._prompt_ends):
            if end > start and other != lane:
                start = end
        rounds = self._jumps.steps_from(chosen, start, members, longer)
        run = self._runs[lane] = Run(rounds, others, turn_before=chosen.model.last_turn)
        if rounds.num_steps > 1 and len(rounds.parts) == 1:
            promise(run, self._memory)
        chosen.model.last_turn = start
