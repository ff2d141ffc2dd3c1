"""More than a device has time for: what is given up, and that the rest is in time."""

from __future__ import annotations

import pytest

from prism.modes import Mode
from prism.sim.jobs import End, Job
from prism.worker import admission
from tests.sim.random_loads import deal_with, jobs, run, serve


def _is_in_time(job: Job, tpot: float) -> bool:
    assert job.end is End.SERVED and job.first_token is not None
    return (job.last_token - job.first_token) / 1e12 <= tpot * (job.output - 1)


def test_too_many_streams_do_not_all_come_late() -> None:
    """Eight models need a quarter of a lane each. They took turns, and none of them was in time.

    Three are, to a few steps over all their tokens: each comes about when it is due.
    """
    shapes = [(1, 1024, 1e-3, 0.0, 4e-3)] * 8
    asked = [(0.0, i, 1, 120) for i in range(8)]
    served = serve(Mode.PRISM, shapes, asked, 1, 16)
    assert sum(_is_in_time(job, 4e-3 * 1.01) for job in served) == 3


def test_a_prompt_is_in_time_beside_streams_that_are_late() -> None:
    """Prompts waited for decodes whose deadlines had passed, and came in pieces of 128 tokens.

    Where a step is chosen when the one before has run: chosen a step ahead, no stream counts as late whose
    step is on its way.
    """
    shapes = [(1, 1024, 1e-3, 0.0, 1e-3), (1, 1024, 1e-3, 0.0, 1e-3)]
    asked = [(0.0, 0, 1, 120), (0.0, 0, 1, 120), *((0.02 + i / 50, 1, 200, 1) for i in range(3))]
    served = serve(Mode.PRISM, shapes, asked, 1, 16, is_queueing=False)
    for job in served[2:]:
        assert job.first_token is not None
        assert (job.first_token - job.arrival) / 1e12 <= 20e-3


def test_late_ones_share_steps_where_objectives_are_loose(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one each had a step of its own, which takes half as long as one with eight of them."""
    last = {}
    for part in (0.0, 0.3):
        monkeypatch.setattr(admission, "LATE_PART", part)
        shapes, asked = [(1, 1024, 1e-3, 0.0, 1e-2)], [(0.0, 0, 8, 2)] * 60
        served = serve(Mode.PRISM, shapes, asked, 1, 64, max_batch_size=64)
        assert all(job.end is End.SERVED for job in served)
        last[part] = max(job.last_token for job in served)
    assert last[0.3] < 0.75 * last[0.0]


def test_a_device_does_not_spend_its_time_on_loads() -> None:
    """Two models that do not fit together took turns at each `min_residency`; a load takes 23 ms."""
    shapes = [(6, 1024, 1e-3, 0.0, 5e-3)] * 2
    asked = [(0.01 * i, i % 2, 10, 20) for i in range(400)]
    device = run(Mode.PRISM, shapes, [], 1, 0, min_residency=0.05, max_wait=60.0)
    made = jobs(device, asked)
    deal_with(device, made)
    assert all(job.end is End.SERVED for job in made)
    loads = sum(model.num_activations for model in device.models.values())
    assert 2 <= loads <= 2 + 4.0 / 0.4


def test_memory_does_not_lie_empty_for_a_model_that_could_not_come() -> None:
    """A large model waited for the end of another's stream, and a small one that was there beside memory that
    was kept for the large one."""
    shapes = [(6, 1024, 1e-3, 0.0, 5e-3), (6, 1024, 1e-3, 0.0, 5e-3), (2, 16384, 1e-3, 0.0, 5e-3)]
    asked = [(0.0, 0, 10, 3000), (0.01, 2, 100, 2), (0.1, 1, 10, 20)]
    asked += [(1.0 + 0.1 * i, 2, 100, 20) for i in range(20)]
    device = run(Mode.PRISM, shapes, [], 1, 4, min_residency=0.05, max_wait=60.0)
    made = jobs(device, asked)
    deal_with(device, made)
    assert all(job.end is End.SERVED for job in made)
    waits = [job.first_token - job.arrival for job in made[3:] if job.first_token is not None]
    assert max(waits) <= 0.1e12
