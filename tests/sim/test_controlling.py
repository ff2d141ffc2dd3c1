"""Devices under the controller: what it moves, and that looking changes nothing but what is decided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prism.config import SchedulingConfig
from prism.controller import placement
from prism.controller.decisions import Plan
from prism.controller.snapshot import Home, PlacementSnapshot
from prism.messages import ModelReport
from prism.modes import RULES, Mode
from prism.sim import commands
from prism.sim.controlling import Controlled, Kind, worker_of
from prism.sim.device import SimDevice
from prism.sim.jobs import End, Job
from prism.sim.ticks import NEVER, to_ticks
from prism.types import ModelId, ModelState, RequestId
from tests.sim import random_loads
from tests.sim.random_loads import LIMITS, SLAB, jobs, models, served

EAGER = SchedulingConfig(
    placement_interval=0.25,
    demand_window=1.0,
    migration_cooldown=0.3,
    migration_gain=0.01,
    drain_timeout=1.5,
)
requests = st.lists(
    st.tuples(st.floats(0, 4.0), st.integers(0, 4), st.integers(1, 200), st.integers(1, 120)),
    min_size=1,
    max_size=60,
)


@pytest.fixture(autouse=True)
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Placement moves at little evidence: the runs are short."""

    def decide(snapshot: PlacementSnapshot, now: float) -> Plan:
        return placement.decide(replace(snapshot, policy=replace(snapshot.policy, doubt=0.0)), now)

    monkeypatch.setattr("prism.controller.placer.decide", decide)


def make(
    shapes: list[Any], num_devices: int, slabs: int, config: SchedulingConfig, **changes: Any
) -> Controlled:
    all_served = {s.model: s for s in (served(i, *shape) for i, shape in enumerate(shapes))}
    num_slabs = slabs + 2 + max(s.costs.shape.weight_bytes // SLAB for s in all_served.values())
    limits = replace(LIMITS, **changes)
    devices = [
        SimDevice((), num_slabs, RULES[Mode.PRISM], limits, lambda n: 1 + 0.2 * (n - 1))
        for _ in range(num_devices)
    ]
    return Controlled(all_served, devices, config)


def jobs_of(controlled: Controlled, asked: list[Any], num_models: int) -> list[Job]:
    made: list[Job] = []
    arrival = -1
    for index, (at, which, prompt, output) in enumerate(sorted(asked)):
        arrival = max(to_ticks(at), arrival + 1)
        name = ModelId(f"m{which % num_models}")
        made.append(Job(RequestId(f"{index:04d}"), name, arrival, prompt, output, arrival + to_ticks(0.05)))
    return made


def run(
    shapes: list[Any],
    asked: list[Any],
    num_devices: int,
    slabs: int,
    config: SchedulingConfig = EAGER,
    **changes: Any,
) -> tuple[Controlled, list[Job]]:
    controlled = make(shapes, num_devices, slabs, config, **changes)
    all_on_the_first_device(controlled)
    jobs = jobs_of(controlled, asked, len(shapes))
    controlled.run(jobs)
    for device, _ in controlled.ended():
        device.check()
        assert device.next_event() == NEVER
    return controlled, jobs


def story(controlled: Controlled, jobs: list[Job]) -> tuple[Any, ...]:
    ends = [(j.request_id, j.end, j.first_token, j.last_token, j.end_time, j.num_restarts) for j in jobs]
    return ends, controlled.homes(), controlled.done


@given(models, requests, st.integers(1, 3), st.integers(0, 12), st.integers(1, 3), st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_jumping_equals_stepping_under_the_controller(
    shapes: list[Any], asked: list[Any], num_devices: int, slabs: int, lanes: int, is_ahead: bool
) -> None:
    """To the picosecond, with models that move, and replicas."""
    options = {"num_lanes": lanes, "load_ahead": is_ahead}
    jumped, stepped = (
        story(*run(shapes, asked, num_devices, slabs, is_stepping=flag, **options)) for flag in (False, True)
    )
    assert jumped == stepped


@given(models, requests, st.integers(2, 3), st.integers(0, 12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_request_ends_once_wherever_its_model_goes(
    shapes: list[Any], asked: list[Any], num_devices: int, slabs: int
) -> None:
    _, jobs = run(shapes, asked, num_devices, slabs)
    for job in jobs:
        assert job.end is not None
        if job.end is End.SERVED:
            assert job.first_token is not None and job.arrival < job.first_token <= job.last_token
            assert job.produced == job.output


BUSY = [(1, 1024, 2e-3, 1e-8, 5e-3)] * 2
"""Two models that take a device each, when asked every 20 ms."""


def count(controlled: Controlled, kind: Kind) -> int:
    return sum(each.kind is kind for each in controlled.done)


def steady(seconds: float) -> list[Any]:
    return [(i / 100, i % 2, 100, 20) for i in range(int(100 * seconds))]


def together(config: SchedulingConfig = EAGER) -> Controlled:
    """Both on the first device."""
    controlled = make(BUSY, 2, 40, config)
    all_on_the_first_device(controlled)
    return controlled


def all_on_the_first_device(controlled: Controlled) -> None:
    for model in controlled.state.homes:
        controlled.state.homes[model] = (Home(worker_of(0)),)
    controlled.routes_changed()


def test_two_busy_models_come_apart() -> None:
    controlled = together()
    jobs = jobs_of(controlled, steady(4.0), 2)
    controlled.run(jobs)
    assert count(controlled, Kind.MIGRATION) >= 1
    homes = controlled.homes()
    assert all(homes), homes
    assert all(job.end is End.SERVED for job in jobs)


@pytest.mark.parametrize(("drain", "has_returned"), [(0.0, True), (60.0, False)])
def test_a_source_ends_what_it_has_or_returns_it(drain: float, has_returned: bool) -> None:
    """What it returns goes on at the target with its tokens."""
    controlled = together(EAGER.model_copy(update={"drain_timeout": drain}))
    asked = [*steady(4.0), *((i / 2, i % 2, 100, 250) for i in range(8))]
    jobs = jobs_of(controlled, asked, 2)
    controlled.run(jobs)
    assert count(controlled, Kind.MIGRATION) >= 1
    assert all(job.end is End.SERVED and job.produced == job.output for job in jobs)
    assert any(job.num_restarts for job in jobs) == has_returned


def test_a_model_that_fills_a_device_gets_another_home_and_requests_go_to_both() -> None:
    controlled = make([(1, 1024, 2e-3, 1e-8, 1e-3)], 2, 40, EAGER)
    jobs = jobs_of(controlled, [(i / 200, 0, 100, 20) for i in range(800)], 1)
    controlled.run(jobs)
    assert count(controlled, Kind.REPLICA) == 1 and len(set(controlled.homes())) == 1
    late = [sum(job.arrival > 3e12 for job in each) for _, each in controlled.ended()]
    assert min(late) > 0.3 * sum(late), late


def test_one_burst_of_late_requests_gives_one_home_more() -> None:
    """It gave as many as fit into the window in which it was seen, though all was in time with the first."""
    controlled = make([(1, 1024, 2e-3, 1e-8, 1e-3)], 5, 40, EAGER.model_copy(update={"demand_window": 6.0}))
    burst, calm = [(2.0, 0, 100, 2)] * 60, [(i / 5, 0, 100, 2) for i in range(50)]
    jobs = jobs_of(controlled, [*burst, *calm], 1)
    controlled.run(jobs)
    late = [
        job for job in jobs if job.first_token is not None and job.first_token > job.arrival + to_ticks(0.04)
    ]
    assert len(late) > 30 and max(job.arrival for job in late) < to_ticks(2.5)
    assert count(controlled, Kind.REPLICA) == 1


def test_streams_that_are_quicker_than_they_must_get_no_replica() -> None:
    """Few long streams keep a device busy whatever their objective: a 14B got five replicas, each as busy."""
    controlled = make([(1, 1024, 2e-3, 1e-8, 2e-2)], 3, 400, EAGER)
    jobs = jobs_of(controlled, [(i / 4, 0, 10, 300) for i in range(16)], 1)
    controlled.run(jobs)
    assert count(controlled, Kind.REPLICA) == 0


def test_a_model_is_moved_away_from_steps_that_outlast_its_objective() -> None:
    """The first must begin within 20 ms; a step of the second takes 50. Both ask little of the device."""
    shapes = [(1, 1024, 1e-3, 1e-8, 2e-2), (1, 1024, 5e-2, 1e-8, 1.0)]
    controlled = make(shapes, 2, 40, EAGER.model_copy(update={"migration_gain": 0.4}))
    all_on_the_first_device(controlled)
    asked = [(0.0, 1, 4, 90), *((0.01 + i / 50, 0, 4, 2) for i in range(200))]
    controlled.run(jobs_of(controlled, asked, 2))
    assert count(controlled, Kind.MIGRATION) == 1
    assert all(controlled.homes()), controlled.homes()


def test_two_runs_are_the_same() -> None:
    asked = steady(2.0)
    assert story(*run(BUSY, asked, 2, 10)) == story(*run(BUSY, asked, 2, 10))


def test_a_look_is_taken_whatever_its_interval() -> None:
    """0.2 + 0.1 is more than the nearest tick, 0.3: the look was not due when its time came, for ever."""
    config = EAGER.model_copy(update={"placement_interval": 0.1})
    _, asked = run(BUSY, steady(0.6), 2, 10, config)
    assert all(job.end is End.SERVED for job in asked)


def test_first_homes_go_by_expected_loads() -> None:
    controlled = make(BUSY * 2, 2, 40, EAGER)
    devices = [device for device, _ in controlled.ended()]
    loads = {ModelId(f"m{i}"): load for i, load in enumerate((0.2, 0.2, 0.9, 0.3))}
    all_served = {s.model: s for s in (served(i, *shape) for i, shape in enumerate(BUSY * 2))}
    homes = Controlled(all_served, devices, EAGER, loads).homes()
    assert sorted(homes) == [("m0", "m1", "m3"), ("m2",)] != sorted(controlled.homes())


def test_requests_go_by_what_devices_report() -> None:
    """What was sent long ago and has ended does not count."""
    controlled = make(BUSY, 2, 40, EAGER.model_copy(update={"placement_interval": 0.0}))
    homes = controlled.state.homes
    homes[ModelId("m0")] = tuple(Home(worker_of(i), 0.0) for i in range(2))
    homes[ModelId("m1")] = (Home(worker_of(0), 0.0),)
    controlled.routes_changed()
    asked = [(i / 200, 1, 10, 2) for i in range(200)] + [(3 + i / 50, 0, 10, 2) for i in range(100)]
    controlled.run(jobs_of(controlled, asked, 2))
    counts = [sum(job.model == "m0" for job in jobs) for _, jobs in controlled.ended()]
    assert min(counts) > 30, counts


def test_what_comes_from_another_device_keeps_its_place() -> None:
    """It goes before younger requests, and its life ends before theirs."""
    controlled = make(BUSY, 1, 40, EAGER, request_timeout=1.0)
    old, young = jobs_of(controlled, [(0.0, 0, 100, 300), (0.9, 0, 100, 200)], 2)
    ((device, _),) = controlled.ended()
    model = device.learn(served(0, *BUSY[0]))
    device.offer(young)
    device.run_until(to_ticks(0.95))
    commands.take_over(device, old, to_ticks(0.95))
    assert model.oldest() is old
    device.run_until(NEVER)
    assert old.end is End.TIMED_OUT and old.end_time == to_ticks(1.0) and young.end is End.SERVED


def test_a_cold_model_is_told_of_again_only_if_nothing_has_come_of_it() -> None:
    """Between two looks a model may come, serve and go."""
    shapes = [(6, 1024, 1e-3, 0.0, 5e-3)] * 2
    device = random_loads.run(Mode.PRISM, shapes, [], 1, 0)
    first, worker = device.models[ModelId("m0")], worker_of(0)

    def told(now: int) -> ModelReport:
        return next(m for m in commands.report_of(device, worker, now).models if m.model == "m0")

    before = told(0)
    assert told(to_ticks(0.1)) is before
    for job in jobs(device, [(0.2, 0, 10, 5), (1.0, 1, 10, 5)]):
        device.offer(job)
    device.run_until(to_ticks(0.3))
    assert told(to_ticks(0.3)).num_started == 1 and first.is_active
    device.run_until(to_ticks(9.0))
    assert first.state is ModelState.COLD
    after = told(to_ticks(9.0))
    assert after.num_started == 1 and after.decoded_tokens == 5 and told(to_ticks(9.5)) is after


def test_an_idle_model_in_memory_is_told_of_again_until_something_has_come_of_it() -> None:
    """But placement hears for how long it has been idle."""
    shapes = [(6, 1024, 1e-3, 0.0, 5e-3)]
    device = random_loads.run(Mode.PRISM, shapes, [], 1, 4)

    def told(seconds: float, *, is_for_placement: bool = False) -> ModelReport:
        now = to_ticks(seconds)
        device.run_until(now)
        (report,) = commands.report_of(device, worker_of(0), now, is_for_placement=is_for_placement).models
        return report

    for job in jobs(device, [(0.2, 0, 10, 5), (2.0, 0, 10, 5), (2.001, 0, 300, 5)]):
        device.offer(job)
    first = told(1.0)
    assert first.state is ModelState.ACTIVE and told(1.5) is first
    assert told(1.9, is_for_placement=True).idle_seconds == pytest.approx(first.idle_seconds + 0.9)
    assert told(1.95) is first
    busy = told(2.004)
    assert busy.num_running + busy.num_waiting > 0
    again = told(4.0)
    assert again is not first and again.num_started == 3 and told(5.0) is again
    commands.evict(device, ModelId("m0"), returns=True, now=to_ticks(5.5))
    assert told(6.0).state is ModelState.COLD
