"""Costs by model, corrected by the steps that have run."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism.costs import Costs, LoadCosts, Shape, StepCosts, from_shape
from prism.engine.step import Chunk
from prism.types import Bytes, ModelId, Seconds
from prism.worker.cost_book import CostBook, chunk_seconds, shape_of, work_of
from prism.worker.loading import Loaded
from prism.worker.models import read_profile
from tests.support.checkpoints import make_model, save
from tests.support.late import LOOKS, LateBackend, LateFlight
from tests.support.local_worker import SLAB, LocalWorker
from tests.support.steps import step_of

NAME = ModelId("m")
SHAPE = Shape(1e6, Bytes(2_000_000), Bytes(2_000_000), Bytes(1024), 2, 64, Bytes(0))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("llama"), tmp_path_factory.mktemp("model") / "m")


def chunk(start: int, length: int) -> Chunk:
    return Chunk(None, start, length, True)  # type: ignore[arg-type]


def test_a_worker_learns_what_its_steps_take(path: Path) -> None:
    """Its clock advances by a millisecond a round, whatever the start had predicted."""
    local = LocalWorker({"m": path}, 8, backend=LateBackend())
    assert local.worker.costs.of(NAME) is None
    for i in range(6):
        local.submit(str(i), "m", [1 + i] * 40, max_tokens=60)
    local.run()
    costs = local.worker.costs.of(NAME)
    profile = local.worker.models["m"].profile
    assert costs is not None and profile is not None
    start = from_shape(shape_of(profile), local.device.rates)
    assert costs.steps.decode(6, 300) > 1.5 * start.steps.decode(6, 300)
    local.close()


def test_what_was_measured_beforehand_is_the_start(path: Path) -> None:
    local = LocalWorker({"m": path}, 8)
    model = local.worker.models["m"]
    profile = read_profile(model.config, SLAB)
    given = from_shape(shape_of(profile), local.device.rates)
    book = CostBook(local.device.rates, {"m": given})
    book.learn(NAME, profile)
    assert book.of(NAME) is given
    for _ in range(40):
        step = step_of([chunk(10, 1)])
        book.ran(NAME, book.expect(NAME, step), Seconds(2 * given.steps.step(*work_of(step))))
    changed = book.of(NAME)
    assert changed is not None and changed.steps.decode(1, 11) > 1.5 * given.steps.decode(1, 11)
    unknown = ModelId("unknown")
    book.ran(unknown, book.expect(unknown, step_of([chunk(0, 1)])), 1.0)
    local.close()


def calibrated(*names: str) -> dict[str, Costs]:
    """As if a profile knew these models, which have one shape."""
    costs = Costs(StepCosts(((1, 0.001), (8, 0.002)), 1e-6, 1e-6), LoadCosts(Seconds(0.5), 1e9), SHAPE)
    return dict.fromkeys(names, costs)


def counts(local: LocalWorker, name: str, kind: str) -> tuple[int, int]:
    """Steps of a model that were alone, and all."""
    alone = local.worker.costs.alone(ModelId(name))
    assert alone is not None
    return alone.kinds[kind].count, local.worker.costs.steps(ModelId(name))[kind].num_steps


def test_steps_that_had_the_device_to_themselves_are_counted_apart(path: Path) -> None:
    known = calibrated("a", "b")
    local = LocalWorker({"a": path, "b": path}, 16, backend=LateBackend(), calibrated=known)
    local.submit("1", "a", [1] * 20, max_tokens=30)
    local.run()
    book = local.worker.costs
    alone, steps = book.alone(ModelId("a")), book.steps(ModelId("a"))
    assert alone is not None and alone.costs == known["a"].digest
    for kind, count in (("decode", 29), ("prompt", 1)):
        seen = alone.kinds[kind]
        assert (seen.count, seen.seconds) == (count, steps[kind].seconds) and seen.seconds > 0
        assert seen.predicted == steps[kind].predicted
    local.submit("2", "a", [2] * 20, max_tokens=30)
    local.submit("3", "b", [3] * 20, max_tokens=30)
    local.run()
    for name, count in (("a", 29), ("b", 0)):
        of_them, of_all = counts(local, name, "decode")
        assert of_all >= count + 29 and of_them - count < 10, "most had the other one beside them"
    local.close()


def test_steps_that_are_found_to_have_run_together_are_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the first one ended nobody has seen: it seemed to have taken the time of both."""
    local = LocalWorker({"a": path}, 16, backend=LateBackend(), calibrated=calibrated("a"))
    local.submit("1", "a", [1] * 20, max_tokens=30)
    local.run(until=lambda: "1" in local.outbox.started and len(local.outbox.tokens.get(("1", 0), [])) == 5)
    is_open = False

    def is_done(flight: LateFlight) -> bool:
        flight._looks = LOOKS
        return is_open and flight.is_launched

    with monkeypatch.context() as patch:
        patch.setattr(LateFlight, "is_done", is_done)
        for _ in range(20):
            local.pump()
        lane = local.worker.models["a"].lane
        assert lane is not None and [flight.is_launched for flight in lane.steps] == [True, True]
        before, is_open = counts(local, "a", "decode"), True
        local.worker._stepper.collect()
    assert counts(local, "a", "decode") == (before[0], before[1] + 2)
    local.run()
    assert counts(local, "a", "decode")[0] > before[0]
    local.close()


def test_without_a_profile_there_is_nothing_to_compare_with(path: Path) -> None:
    local = LocalWorker({"a": path}, 8)
    local.submit("1", "a", [1] * 20, max_tokens=5)
    local.run()
    assert local.worker.costs.steps(ModelId("a"))["decode"].num_steps == 4
    assert local.worker.costs.alone(ModelId("a")) is None
    local.close()


def test_loads_count_but_for_the_first_which_compiles_kernels(path: Path) -> None:
    local = LocalWorker({"a": path}, 8, calibrated=calibrated("a"))
    model = local.worker.models["a"]
    for times in range(3):
        local.submit(str(times), "a", [1] * 20, max_tokens=2)
        local.run()
        alone = local.worker.costs.alone(ModelId("a"))
        assert alone is not None and alone.kinds["load"].count == times
        local.worker.evict(model)
        local.run()
    assert alone.kinds["load"].predicted == pytest.approx(2 * local.worker.costs._calibrated["a"].activation)
    local.close()


def test_loads_that_shared_the_link_do_not_count(path: Path) -> None:
    local = LocalWorker({"a": path, "b": path}, 8)
    arrivals, other = local.worker._arrivals, local.worker.models["b"]

    def ended(now: float, seconds: float) -> bool:
        local.now = now
        return arrivals._had_link_alone(Loaded(ModelId("a"), seconds, None))

    assert ended(1000.0, 0.5)
    assert not ended(1000.3, 0.5), "another one ended meanwhile"
    assert ended(1000.8, 0.5)
    other.load = object()  # type: ignore[assignment]
    assert not ended(1002.0, 0.5), "another one is under way"
    other.load = None
    local.close()


def test_a_step_counts_pairs_of_prompts_and_context_of_decodes(path: Path) -> None:
    local = LocalWorker({"m": path}, 8)
    costs = from_shape(shape_of(read_profile(local.worker.models["m"].config, SLAB)), local.device.rates)
    step = step_of([chunk(9, 1), chunk(100, 50)])
    seconds = costs.steps.step(*work_of(step))
    assert seconds == costs.steps.step(51, pairs=50 * 125, context=10)
    parts = chunk_seconds(costs, step)
    assert sum(parts) == pytest.approx(seconds) and min(parts) > 0
    local.close()
