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
from typing import NamedTuple

from prism.modes import Rules
from prism.sim.jobs import Chunk
from prism.sim.jumps import gives_up, order_of_rounds, steps_in_turn, steps_with_time
from prism.sim.memory import Memory
from prism.sim.model import SimModel, able_to_step
from prism.sim.modes import Limits
from prism.sim.overlap import Longer, Overlap, Pulls, pulls_of_others
from prism.sim.rounds import Part, Rounds
from prism.sim.runs import Leaving, Listener, Run, advance, close, steps_until_change
from prism.sim.ticks import NEVER, to_seconds
from prism.sim.views import runnable
from prism.types import ModelId
from prism.worker import turns
from prism.worker.snapshot import TurnSnapshot


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
        self._models: dict[ModelId, SimModel] = {}
        self._lanes: list[list[SimModel]] = [[] for _ in range(limits.num_lanes)]
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
        self._rules = rules
        self._limits = limits
        self._overlap = Overlap(together)
        self._listener = listener
        self._has_emptied = False
        """A lane has lost what it was to do, or has room for more."""
        self._is_settled = False
        """Nothing has run, come or changed for any model since lanes were last given something to do."""
        self._stalled: list[SimModel] = []
        """Models that have lacked memory since memory changed; those that have left meanwhile lack none."""
        self.num_decisions = 0
        self.busy = 0
        """Ticks in which lanes worked, of all lanes."""

    def add(self, model: SimModel) -> None:
        """A model that may come."""
        self._models[model.name] = model

    def bind(self, model: SimModel) -> None:
        """To the lane with the fewest models, when it is first loaded, for good."""
        if model.lane is None:
            model.lane = min(range(len(self._lanes)), key=lambda lane: (len(self._lanes[lane]), lane))
            self._lanes[model.lane].append(model)

    def account(self, now: int) -> None:
        """Bring counters up to date. Nothing else changes by it."""
        for run in self._runs:
            if run is not None and not run.chunks:
                advance(run, now)

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
                    advance(run, now)
                if run.rounds.is_closing:
                    run.rounds.cut(now)

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
            rounds = run.rounds
            self._runs[lane] = None
            self._has_emptied, self._is_settled = True, False
            self._ends[lane] = rounds.end
            self.busy += rounds.end - rounds.start
            if run.chunks:
                heappush(self._coming, (rounds.end, next(self._numbers), None))
            else:
                advance(run, now)
                self._decided[lane] = rounds.decided_at(rounds.num_steps - 1)
            for leaving in close(run, self._listener):
                leaving.model.num_leaving += 1
                leaving.model.leaving_blocks += leaving.blocks
                heappush(self._coming, (leaving.end, next(self._numbers), leaving))

    def _leaves(self, leaving: Leaving) -> None:
        leaving.model.num_leaving -= 1
        leaving.model.leaving_blocks -= leaving.blocks
        self._listener.completed(leaving.job, leaving.end)

    # --- what comes next --------------------------------------------------------------------------------

    def plan(self, now: int) -> None:
        """Give each lane that has room something to do, until all agree on what decodes side by side."""
        if self._is_settled:
            return
        self._is_settled = True
        while True:
            self._has_emptied = False
            for lane in self._idle():
                self._plan(lane, now)
            pulls = self._pulls()
            for lane, run in enumerate(self._runs):
                if run is not None and not run.chunks and run.others != pulls_of_others(pulls, lane):
                    self._cut(lane, now)
            self._close_due(now)
            if not self._has_emptied:
                return

    def _idle(self) -> list[int]:
        """Lanes that have room and could use it, who decided longest ago first.

        A lane has room, too, when what it was to do is cut before it was due: then what decodes beside it is
        another, or memory is.
        """
        if None not in self._runs:
            return []
        lanes = enumerate(zip(self._runs, self._lanes, strict=True))
        idle = [lane for lane, (run, models) in lanes if run is None and able_to_step(models)]
        return idle if len(idle) < 2 else sorted(idle, key=lambda lane: (self._decided[lane], lane))

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
            run.gone.add(model)
        if model.num_leaving:
            ending = [each[2] for each in sorted(self._coming) if each[2] and each[2].model is model]
            self._coming = [each for each in self._coming if not each[2] or each[2].model is not model]
            heapify(self._coming)
            for leaving in ending:
                self._leaves(leaving)

    def _cut(self, lane: int, now: int, at_least: int = 0) -> None:
        run = self._runs[lane]
        if run is None or run.chunks:
            return
        advance(run, now)
        run.rounds.cut(now, at_least)
        if run.rounds.num_steps == 0:
            model = run.rounds.parts[0].who
            if model not in run.gone:
                model.decodes.forgo()
            model.last_turn = run.turn_before
            self._runs[lane] = None
            self._has_emptied, self._is_settled = True, False

    def _pulls(self) -> list[float]:
        """Of each lane; 0 where nothing decodes."""
        return [self._overlap.pull(models) for models in self._lanes]

    def _others(self, lane: int) -> Pulls:
        """Pulls of the lanes beside this one that decode."""
        pull = self._overlap.pull
        pulls = [pull(models) for other, models in enumerate(self._lanes) if other != lane]
        return tuple([each for each in pulls if each])

    def _plan(self, lane: int, now: int) -> None:
        """One decision of the policy, and steps as long as it would decide the same."""
        while members := able_to_step(self._lanes[lane]):
            turn = self._turn(lane, members, now)
            model = self._models[turn.model]
            self._decided[lane] = now
            if self._start(model, turn.budget, lane, now):
                return
            model.is_stalled = True  # for want of memory; the others' turn
            self._stalled.append(model)

    def _turn(self, lane: int, members: Sequence[SimModel], now: int) -> turns.Turn:
        """What the policy chooses; a model that only decodes, and is alone, is no choice."""
        with_prompts = any(model.prompts or model.waiting for model in members)
        if len(members) == 1 and not with_prompts:
            return turns.Turn(members[0].name, self._limits.max_batch_tokens)
        others = self._neighbours(lane) if with_prompts else ()
        lanes = {lane, *(model.lane for model in others if model.lane is not None)}
        longer = {each: self._overlap.beside(self._others(each)) for each in lanes}
        snapshot = TurnSnapshot(
            tuple([runnable(model, self._rules, longer[lane]) for model in members]),
            self._limits.max_batch_tokens,
            tuple([runnable(m, self._rules, longer[m.lane]) for m in others if m.lane is not None]),
        )
        self.num_decisions += 1
        turn = turns.decide(snapshot, to_seconds(now))
        assert turn is not None
        return turn

    def _neighbours(self, lane: int) -> list[SimModel]:
        return [m for m in self._models.values() if m.decodes.size and m.lane != lane and m.is_active]

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
        run = self._runs[lane]
        assert run is not None
        model.last_turn = run.rounds.start
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
        is_ahead = self._limits.is_queueing and not self._neighbours(lane)
        part = Part(model, model.chunk_ticks(chunks), 0)
        rounds = Rounds([part], start, 1, now, is_ahead=is_ahead)
        self._prompt_ends[lane] = rounds.end
        self._runs[lane] = Run(rounds, (), chunks, has_decodes)

    def _start_decodes(self, model: SimModel, lane: int, now: int) -> None:
        others = self._others(lane)
        longer = self._overlap.beside(others)
        members = able_to_step(self._lanes[lane])
        start = max(now, self._ends[lane])
        for other, end in enumerate(self._prompt_ends):
            if end > start and other != lane:
                start = end
        chosen = Chosen(now, start)
        is_single = self._limits.is_stepping or any(m.prompts or m.waiting for m in members)
        is_single = is_single or gives_up(members, self._rules, longer)
        order = [model] if is_single else order_of_rounds(model, members)
        rounds = self._steps(order, members, longer, chosen, is_single=is_single)
        if len(order) > 1 and rounds.num_steps < 2 * len(order):  # they do not take turns
            rounds = self._steps([model], members, longer, chosen, is_single=False)
        self._runs[lane] = Run(rounds, others, turn_before=model.last_turn)

    def _steps(
        self,
        order: list[SimModel],
        members: Sequence[SimModel],
        longer: Longer,
        chosen: Chosen,
        *,
        is_single: bool,
    ) -> Rounds[SimModel]:
        """As many steps in this order as the policy would choose."""
        parts = [Part(m, *m.decode_ticks(longer(m))) for m in order]
        steps = 1 if is_single else steps_until_change(order)
        if steps > 1:
            steps = steps_with_time(steps, members, len(order), self._rules, longer)
        rounds = Rounds(parts, chosen.start, steps, chosen.time, is_ahead=self._limits.is_queueing)
        if steps > 1:
            rounds.shorten(steps_in_turn(rounds, members, self._rules))
        return rounds


class Chosen(NamedTuple):
    """A step: when it is chosen, and when it begins."""

    time: int
    start: int
