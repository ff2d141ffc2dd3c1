"""When the next step of a lane is chosen: shortly before the present one ends, and no later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prism.attention.kernels import KvView
from prism.engine.runner import Runner
from prism.engine.step import Step
from prism.engine.torch_runner import TorchRunner
from prism.models.decoder import Decoder
from prism.types import LaneId
from prism.worker import stepper
from tests.support.checkpoints import make_model, prompts, reference, save
from tests.support.late import LOOKS, LateBackend, LateFlight, LateRunner
from tests.support.local_worker import LocalWorker

DECODE, PROMPT = 0.020, 0.030
ROUND = 0.001
"""Of the loop, in `LocalWorker`."""
LEAD = 5 * ROUND
"""In these tests, whose rounds take longer than a server's."""


class TimedFlight(LateFlight):
    """Runs for so long, behind what its lane has queued before."""

    made = ended = begun = 0.0
    backend: TimedBackend

    def launch(self, num_groups: int | None = None, seconds: float = float("inf")) -> bool:
        has_advanced = super().launch(num_groups, float("inf"))
        if has_advanced:
            self.begun = max(self.backend.now, self.backend.lane_end)
            self.ended = self.backend.lane_end = self.begun + self.backend.seconds(self.step)
        return has_advanced

    def is_done(self) -> bool:
        self._looks = LOOKS if self.backend.now >= self.ended else 0
        return self._looks > 0


class TimedRunner(LateRunner):
    def __init__(self, inner: TorchRunner, backend: TimedBackend) -> None:
        super().__init__(inner)
        self._backend = backend

    def run(self, step: Step, *, is_apart: bool = False) -> LateFlight:
        flight = super().run(step, is_apart=is_apart)
        flight.__class__ = TimedFlight
        assert isinstance(flight, TimedFlight)
        flight.backend, flight.made = self._backend, self._backend.now
        self._backend.flights.append(flight)
        return flight


class TimedBackend(LateBackend):
    """One lane, whose steps take so long by the worker's clock, whatever a model makes of them."""

    num_lanes = 1

    def __init__(self) -> None:
        super().__init__()
        self.local: LocalWorker | None = None
        self.flights: list[TimedFlight] = []
        self.lane_end = 0.0
        self.factor = 1.0

    @property
    def now(self) -> float:
        assert self.local is not None
        return self.local.now

    def seconds(self, step: Step) -> float:
        return self.factor * (PROMPT if step.has_prompts else DECODE)

    def runner(self, model: Decoder, kv: KvView, lane: LaneId) -> Runner:
        inner = super().runner(model, kv, lane)
        assert isinstance(inner, LateRunner)
        return TimedRunner(inner._inner, self)


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LocalWorker, TimedBackend]]:
    monkeypatch.setattr(stepper, "LEAD_SECONDS", LEAD)
    backend = TimedBackend()
    local = LocalWorker({"m": save(make_model("llama"), tmp_path / "m")}, 16, backend=backend)
    backend.local = local
    local.submit("warm", "m", [1, 2, 3], max_tokens=30)
    local.run()
    backend.flights.clear()
    yield local, backend
    local.close()


def ahead(backend: TimedBackend) -> list[float]:
    """How long before the end of each step the one behind it was made."""
    return [a.ended - b.made for a, b in zip(backend.flights, backend.flights[1:], strict=False)]


def test_a_step_is_chosen_when_the_one_before_is_about_to_end(
    timed: tuple[LocalWorker, TimedBackend],
) -> None:
    """Chosen when that began, it kept whoever came meanwhile waiting for both."""
    local, backend = timed
    local.submit("r", "m", [1, 2, 3], max_tokens=30)
    local.run()
    leads = ahead(backend)[3:]
    assert len(leads) > 20 and all(LEAD - 3 * ROUND <= lead <= LEAD + ROUND for lead in leads), leads


def test_who_comes_meanwhile_waits_for_one_step(timed: tuple[LocalWorker, TimedBackend]) -> None:
    local, backend = timed
    local.submit("r", "m", [1, 2, 3], max_tokens=40)
    local.run(until=lambda: len(local.outbox.tokens.get(("r", 0), ())) > 10)
    present = backend.flights[-1]
    assert present.ended > local.now + 2 * LEAD, "it has just begun"
    local.submit("late", "m", prompts(1, 20)[0], max_tokens=2)
    local.run()
    following = backend.flights[backend.flights.index(present) + 1]
    assert following.step.has_prompts and following.begun == present.ended
    assert local.outbox.tokens["r", 0] == reference(make_model("llama"), [1, 2, 3], 40)


def test_the_device_does_not_wait(timed: tuple[LocalWorker, TimedBackend]) -> None:
    """Nor when all steps take a third of the time, after one of each kind, and one longer prompt for which
    the profile had expected more."""
    local, backend = timed
    for part in range(2):
        for i in range(6):
            local.submit(f"{part}.{i}", "m", prompts(1, 20 + i)[0], max_tokens=10 + i)
            local.run(until=lambda: len(backend.flights) % 4 == 3)
        local.run()
        pairs = list(zip(backend.flights, backend.flights[1:], strict=False))
        idle = [b.begun - a.ended for a, b in pairs]
        assert sum(gap > 0 for gap in idle) <= 1 + 2 * part, idle
        backend.flights.clear()
        backend.factor /= 3


def test_a_loop_that_was_held_up_learns_nothing_from_it(timed: tuple[LocalWorker, TimedBackend]) -> None:
    """Two steps were found to have run at a time, and the second seemed to have taken next to nothing."""
    local, backend = timed
    local.submit("r", "m", [1, 2, 3], max_tokens=40)
    local.run(until=lambda: len(backend.flights) == 20 and len(local.device.lanes[0].steps) == 2)
    local.now += 3 * DECODE
    local.run()
    leads = ahead(backend)[-10:]
    assert all(LEAD - 3 * ROUND <= lead <= LEAD + 2 * ROUND for lead in leads), leads


def test_nothing_is_waited_for_that_is_not_known(tmp_path: Path) -> None:
    """The first steps of a model have the next one queued as soon as they are launched."""
    backend = TimedBackend()
    backend.local = local = LocalWorker({"m": save(make_model("llama"), tmp_path / "m")}, 16, backend=backend)
    local.submit("r", "m", [1, 2, 3], max_tokens=4)
    local.run()
    assert ahead(backend)[0] > PROMPT - 3 * ROUND
    local.close()
