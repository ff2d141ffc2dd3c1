"""Small random runs: few models on one device that has too little memory for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from prism.costs import Costs, LoadCosts, Shape, StepCosts
from prism.modes import RULES, Mode
from prism.sim.device import SimDevice
from prism.sim.jobs import Job, Served
from prism.sim.modes import Limits
from prism.sim.ticks import NEVER, to_ticks
from prism.types import Bytes, MiB, ModelId, RequestId, Seconds, Slo

SLAB = 2 * MiB
LIMITS = Limits(slab_bytes=SLAB, max_batch_tokens=64, max_batch_size=6, max_wait=2.0, min_residency=0.1)
LIMITS = replace(LIMITS, horizon=0.02, quantum=0.3, request_timeout=5.0, load_ahead=False)


def served(index: int, slabs: int, kv: int, base: float, slope: float, tpot: float) -> Served:
    """A model of so many slabs of weights."""
    shape = Shape(1e6, Bytes(slabs * SLAB), Bytes(slabs * SLAB), Bytes(kv), 1, 1, Bytes(0))
    steps = StepCosts(((1, base), (8, base * 1.1), (64, base * 2)), 1e-8, slope)
    costs = Costs(steps, LoadCosts(Seconds(0.01), 1e9), shape)
    return Served(ModelId(f"m{index}"), "test", costs, 400, Slo(20 * base, tpot))


models = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.sampled_from([1024, 4096, 16384]),
        st.floats(1e-4, 5e-3),
        st.sampled_from([0.0, 1e-8, 1e-6]),
        st.sampled_from([1e-4, 1e-3, 5e-3, 2e-2]),
    ),
    min_size=1,
    max_size=5,
)
requests = st.lists(
    st.tuples(st.floats(0, 1.0), st.integers(0, 4), st.integers(1, 200), st.integers(1, 120)),
    min_size=1,
    max_size=40,
)


def run(mode: Mode, shapes: list[Any], asked: list[Any], lanes: int, slabs: int, **changes: Any) -> SimDevice:
    """A device that has dealt with everything; its jobs are in `device.jobs`."""
    all_served = [served(i, *shape) for i, shape in enumerate(shapes)]
    rules = RULES[mode]
    limits = replace(LIMITS, num_lanes=lanes, **changes)
    weights = [s.costs.shape.weight_bytes // SLAB for s in all_served]
    slabs += sum(weights) if rules.is_resident else max(weights)
    slabs += 2 * len(weights) if rules.is_resident else 2
    shares = {s.model: 2 + slabs % 3 for s in all_served} if rules.has_shares else None
    slabs += 2 * len(weights) if rules.has_shares else 0
    return SimDevice(all_served, slabs, rules, limits, lambda n: 1 + 0.2 * (n - 1), shares)


def jobs(device: SimDevice, asked: list[Any]) -> list[Job]:
    """Requests for the device's models, in order of arrival."""
    names = sorted(device.models)
    made: list[Job] = []
    arrival = -1
    for index, (at, which, prompt, output) in enumerate(sorted(asked)):
        name = names[which % len(names)]
        arrival = max(to_ticks(at), arrival + 1)  # as `workload.jobs_of` does it
        due = arrival + to_ticks(device.models[name].served.slo.ttft)
        made.append(Job(RequestId(f"{index:04d}"), name, arrival, prompt, output, due))
    return made


def serve(
    mode: Mode, shapes: list[Any], asked: list[Any], lanes: int, slabs: int, **changes: Any
) -> list[Job]:
    """All requests, ended."""
    device = run(mode, shapes, asked, lanes, slabs, **changes)
    made = jobs(device, asked)
    deal_with(device, made)
    return made


def deal_with(device: SimDevice, made: list[Job]) -> None:
    """All of it, event by event."""
    for job in made:
        device.offer(job)
    while (time := device.next_event()) < NEVER:
        device.run_until(time + 1)
        device.check()
        check_settled(device)


def check_settled(device: SimDevice) -> None:
    """Lanes that are left alone would be given nothing else to do if they were asked again."""
    stepper = device.stepper
    runs = [(run, run and run.rounds.num_steps) for run in stepper._runs]
    stepper._is_settled = False
    stepper.plan(device.now)
    assert [(run, run and run.rounds.num_steps) for run in stepper._runs] == runs
