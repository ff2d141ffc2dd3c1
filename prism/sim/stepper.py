"""The lanes of a simulated device: what runs on them, and until when nothing about it can change.

Mirrors `worker/stepper.py`: each idle lane asks `worker/turns.py` for its next step; decodes of several lanes
overlap; a step with prompts begins when the others' present steps have ended, and they wait for its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prism.modes import Rules
from prism.sim.jobs import Chunk
from prism.sim.jumps import gives_up, may_follow, order_of_rounds, steps_with_time
from prism.sim.memory import Memory
from prism.sim.model import SimModel
from prism.sim.modes import Limits
from prism.sim.overlap import Longer, Overlap, pulls_of_others
from prism.sim.rounds import Part, Rounds
from prism.sim.runs import Listener, Run, advance, close, steps_until_change
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
        self._memory = memory
        self._rules = rules
        self._limits = limits
        self._overlap = Overlap(together)
        self._listener = listener
        self._has_prompts = False
        """A step with prompts is on its way, on some lane."""
        self._has_emptied = False
        """A lane has lost what it was to do."""
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

    def next_end(self) -> int:
        """When the next run ends."""
        return min((run.rounds.end for run in self._runs if run is not None), default=NEVER)

    @property
    def has_stalled(self) -> bool:
        """Some model lacks memory for its next step."""
        return any(model.is_stalled for model in self._models.values())

    def wake(self, now: int) -> None:
        """Memory has changed: who lacked it tries again."""
        for model in self._models.values():
            if model.is_stalled:
                model.is_stalled = False
                self.disturb(model, now)

    # --- what has run -----------------------------------------------------------------------------------

    def sync(self, now: int) -> None:
        """Account for the steps that have ended and begun by now.

        A lane whose step ends just now decides anew, as all lanes do whose steps end now.
        """
        for run in self._runs:
            if run is not None and not run.chunks:
                advance(run, now)
                rounds = run.rounds
                if rounds.done and rounds.end_of(rounds.done) == now:
                    rounds.cut(now)

    def collect(self, now: int) -> None:
        """Close the runs that have ended."""
        for lane, run in enumerate(self._runs):
            if run is None or run.rounds.end > now:
                continue
            self._runs[lane] = None
            self.busy += run.rounds.end - run.rounds.start
            if run.chunks:
                self._has_prompts = False
            else:
                self._decided[lane] = run.rounds.end_of(run.rounds.num_steps - 1)
            close(run, self._listener, now)

    # --- what comes next --------------------------------------------------------------------------------

    def plan(self, now: int) -> None:
        """Give each idle lane something to do, until all agree on how many decode side by side."""
        while True:
            self._has_emptied = False
            for lane in self._idle():
                if not self._has_prompts:
                    self._plan(lane, now)
            pulls = self._pulls()
            for lane, run in enumerate(self._runs):
                if run is not None and not run.chunks and run.others != pulls_of_others(pulls, lane):
                    self._cut(lane, now)
            if not self._has_emptied:
                return

    def _idle(self) -> list[int]:
        """Lanes that have nothing to do and could, who decided longest ago first.

        A lane becomes idle, too, when what it was to do is cut before it began: then the number of lanes that
        decode is another, or memory is.
        """
        if self._has_prompts or None not in self._runs:
            return []
        idle = [
            lane
            for lane, models in enumerate(self._lanes)
            if self._runs[lane] is None and any(model.can_step for model in models)
        ]
        return idle if len(idle) < 2 else sorted(idle, key=lambda lane: (self._decided[lane], lane))

    def disturb(self, model: SimModel, now: int) -> None:
        """Something about a model has changed: its lane decides anew after the present step.

        A step that begins just now has its blocks and stays: else two models could take an empty slab from
        each other for ever.
        """
        if model.lane is not None:
            self._cut(model.lane, now, at_least=1)

    def remove(self, model: SimModel, now: int) -> None:
        """The model loses its memory; what its present step draws is lost."""
        if model.lane is None:
            return
        self._cut(model.lane, now)
        run = self._runs[model.lane]
        if run is not None:
            run.gone.add(model)

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
            self._has_emptied = True

    def _pulls(self) -> list[float | None]:
        """Of each lane; None of those on which no decodes run."""
        return [
            None if run is None or run.chunks else self._overlap.pull(models)
            for run, models in zip(self._runs, self._lanes, strict=True)
        ]

    def _plan(self, lane: int, now: int) -> None:
        """One decision of the policy, and steps as long as it would decide the same."""
        while members := [model for model in self._lanes[lane] if model.can_step]:
            turn = self._turn(lane, members, now)
            model = self._models[turn.model]
            self._decided[lane] = now
            if self._start(model, turn.budget, lane, now):
                return
            model.is_stalled = True  # for want of memory; the others' turn

    def _turn(self, lane: int, members: Sequence[SimModel], now: int) -> turns.Turn:
        """What the policy chooses; a model that only decodes, and is alone, is no choice."""
        with_prompts = any(model.prompts or model.waiting for model in members)
        if len(members) == 1 and not with_prompts:
            return turns.Turn(members[0].name, self._limits.max_batch_tokens)
        others = self._neighbours(lane) if with_prompts else ()
        longer = {each: self._beside(each) for each in {lane, *(model.lane for model in others)}}
        snapshot = TurnSnapshot(
            tuple(runnable(model, self._rules, longer[lane]) for model in members),
            self._limits.max_batch_tokens,
            tuple(runnable(model, self._rules, longer[model.lane]) for model in others),
        )
        self.num_decisions += 1
        turn = turns.decide(snapshot, to_seconds(now))
        assert turn is not None
        return turn

    def _beside(self, lane: int | None) -> Longer:
        """By how much decodes of a lane take longer where all lanes that have any run side by side."""
        pulls = (self._overlap.pull(models) for i, models in enumerate(self._lanes) if i != lane)
        others = tuple(pull for pull in pulls if pull)
        return self._overlap.beside(others)

    def _neighbours(self, lane: int) -> list[SimModel]:
        return [m for m in self._models.values() if m.lane != lane and m.is_active and m.decodes.size]

    def _start(self, model: SimModel, budget: int, lane: int, now: int) -> bool:
        """Begin a step; False if there is no memory for any of it."""
        size = self._limits.max_batch_size
        has_prompts = bool(model.prompts or model.waiting)
        wanted = model.blocks_wanted(budget, size) if has_prompts else model.decodes.blocks_for(1)
        if wanted > model.free_blocks:
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
        model.last_turn = now
        return True

    def _start_prompts(
        self, model: SimModel, chunks: list[Chunk], has_decodes: bool, lane: int, now: int
    ) -> None:
        """Behind the present steps of the other lanes."""
        start = now
        for other, run in enumerate(self._runs):
            if run is not None:
                self._cut(other, now, at_least=1)
                start = max(start, run.rounds.end)
        rounds = Rounds([Part(model, model.chunk_ticks(chunks), 0)], start, 1)
        self._runs[lane] = Run(rounds, (), chunks, has_decodes)
        self._has_prompts = True

    def _start_decodes(self, model: SimModel, lane: int, now: int) -> None:
        others = pulls_of_others(self._pulls(), lane)
        longer = self._overlap.beside(others)
        members = [m for m in self._lanes[lane] if m.can_step]
        beside = self._beside(lane)
        is_single = self._limits.is_stepping or any(m.prompts or m.waiting for m in members)
        is_single = is_single or gives_up(members, self._rules, beside)
        order = [model] if is_single else order_of_rounds(model, members, self._rules, longer, now)
        parts = [Part(m, *m.decode_ticks(longer(m))) for m in order]
        steps = 1 if is_single else steps_until_change(order)
        if steps > 1:
            steps = steps_with_time(steps, members, len(order), self._rules, beside)
        rounds = Rounds(parts, now, steps)
        if len(order) < len(members) and steps > 1:
            steps = may_follow(rounds, model, members, self._rules)
            rounds = Rounds(parts, now, steps)
        self._runs[lane] = Run(rounds, others, turn_before=model.last_turn)
