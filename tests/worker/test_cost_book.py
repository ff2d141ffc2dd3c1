"""Costs by model, corrected by the steps that have run."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism.costs import from_shape
from prism.engine.step import Chunk
from prism.types import ModelId, Seconds
from prism.worker.cost_book import CostBook, chunk_seconds, shape_of, work_of
from prism.worker.models import read_profile
from tests.support.checkpoints import make_model, save
from tests.support.late import LateBackend
from tests.support.local_worker import SLAB, LocalWorker
from tests.support.steps import step_of

NAME = ModelId("m")


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


def test_a_step_counts_pairs_of_prompts_and_context_of_decodes(path: Path) -> None:
    local = LocalWorker({"m": path}, 8)
    costs = from_shape(shape_of(read_profile(local.worker.models["m"].config, SLAB)), local.device.rates)
    step = step_of([chunk(9, 1), chunk(100, 50)])
    seconds = costs.steps.step(*work_of(step))
    assert seconds == costs.steps.step(51, pairs=50 * 125, context=10)
    parts = chunk_seconds(costs, step)
    assert sum(parts) == pytest.approx(seconds) and min(parts) > 0
    local.close()
