"""Lanes: what is queued comes out in order, and prompts share the device with nobody."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prism.engine.kv_blocks import Move
from prism.engine.sampler import NOTHING, Sampled
from prism.engine.scheduler import Slots
from prism.engine.step import Chunk
from prism.memory.host import HostDriver
from prism.memory.pool import SlabPool
from prism.types import BlockId, Bytes, LaneId, MiB, ModelId
from prism.worker.cpu_device import TorchBackend
from prism.worker.device import Device
from prism.worker.lanes import Deferred, Flight, Lane, had_device_alone
from tests.support.steps import step_of

MODEL = ModelId("m")


class Work:
    """Done when told."""

    def __init__(self) -> None:
        self.done = False

    def is_done(self) -> bool:
        return self.done


class RecordingBackend(TorchBackend):
    num_lanes = 3

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.waits: list[tuple[LaneId, list[Any]]] = []

    def wait_for(self, lane: LaneId, works: Any) -> None:
        self.waits.append((lane, list(works)))


@pytest.fixture
def device() -> Any:
    slab = Bytes(2 * MiB)
    driver = HostDriver(Bytes(2 * slab))
    device = Device(driver, SlabPool(driver, slab, 2), torch.device("cpu"), "cpu:0", RecordingBackend())
    yield device
    device.close()


class FakeStep(Work):
    """A step of so many pieces, each of which is launched when the test says so."""

    sampled = ()

    def __init__(self, *lengths: int, pieces: int = 0) -> None:
        super().__init__()
        chunks = tuple(Chunk(None, 0, length, True) for length in lengths)  # type: ignore[arg-type]
        self.step = step_of(chunks)
        self.pieces = pieces
        self.is_begun = False

    @property
    def is_launched(self) -> bool:
        return not self.pieces

    def launch(self, num_groups: int | None = None, seconds: float = 0.0) -> bool:
        self.is_begun, self.pieces = True, self.pieces - 1
        return True

    def draws(self) -> Sampled:
        return NOTHING


def test_work_comes_out_in_the_order_in_which_it_was_queued() -> None:
    lane = Lane(LaneId(0), Slots(4))
    works = [Work() for _ in range(3)]
    for work in works:
        lane.queue(MODEL, work)
    works[1].done = True
    assert list(lane.finished()) == [] and lane.num_completed == 0
    works[0].done = True
    assert [flight.number for flight in lane.finished()] == [1, 2]
    assert lane.num_completed == 2 and lane.stamp().step == 3


def turn(device: Device, lane: int, step: FakeStep) -> Flight:
    """Queues a step as the stepper does, up to its launch."""
    flight = device.lanes[lane].queue(MODEL, step, step)
    flight.after = device.neighbours(device.lanes[lane], step.step)
    if flight.may_be_launched:
        device.take_turns(device.lanes[lane], flight)
    return flight


def test_decodes_run_side_by_side_and_prompts_alone(device: Device) -> None:
    backend = device.backend
    assert isinstance(backend, RecordingBackend)
    decode, prompt = FakeStep(1, 1), FakeStep(1, 300)
    turn(device, 0, decode)
    turn(device, 1, FakeStep(1))
    assert backend.waits == []
    device.lanes[1].flights.clear()
    turn(device, 1, prompt)
    assert backend.waits == [(1, [decode])]
    turn(device, 2, FakeStep(1, 1))
    assert backend.waits[1:] == [(2, [prompt])]


def test_what_is_not_launched_is_not_waited_for(device: Device) -> None:
    """An event that has not been recorded counts as one that has come: the decode would run at once."""
    backend = device.backend
    assert isinstance(backend, RecordingBackend)
    prompt = FakeStep(300, pieces=2)
    turn(device, 0, prompt)
    decode = turn(device, 1, FakeStep(1, pieces=1))
    assert not decode.may_be_launched and device.lanes[1].launching is decode
    prompt.launch()
    assert not decode.may_be_launched and not backend.waits
    prompt.launch()
    assert decode.may_be_launched
    device.take_turns(device.lanes[1], decode)
    assert backend.waits == [(1, [prompt])]


def test_what_has_run_is_not_waited_for_on_the_device(device: Device) -> None:
    backend = device.backend
    assert isinstance(backend, RecordingBackend)
    prompt = FakeStep(300, pieces=1)
    turn(device, 0, prompt)
    decode = turn(device, 1, FakeStep(1, pieces=1))
    prompt.launch()
    prompt.done = True
    assert len(list(device.lanes[0].finished())) == 1
    device.take_turns(device.lanes[1], decode)
    assert backend.waits == []
    decode.look(7.0)
    assert decode.after == () and decode.begin == 7.0


def test_copies_are_queued_behind_a_step_that_is_half_launched(device: Device) -> None:
    lane, step = device.lanes[0], FakeStep(300, pieces=1)
    lane.queue(MODEL, step, step)
    copied: list[tuple[Move, ...]] = []
    device.backend.copy_blocks = lambda kv, moves, lane: copied.append(moves) or Work()  # type: ignore
    moves = (Move(BlockId(1), BlockId(2)),)
    device.move_blocks(MODEL, None, moves, lane)  # type: ignore[arg-type]
    copy = lane.flights[-1]
    assert copied == [] and not copy.is_launched and not copy.work.is_done()
    assert lane.stamp().step == 2, "memory that is given back now waits for the copy too"
    step.launch()
    assert lane.launching is copy and isinstance(copy.work, Deferred)
    copy.work.launch()
    assert copied == [moves] and lane.launching is None
    device.move_blocks(MODEL, None, moves, lane)  # type: ignore[arg-type]
    assert len(copied) == 2


def test_models_spread_over_lanes(device: Device) -> None:
    assert [device.bind().lane_id for _ in range(4)] == [0, 1, 2, 0]


def test_copies_are_settled_only_behind_steps(device: Device) -> None:
    lane = device.lanes[0]
    running, copied = FakeStep(1), Work()
    copied.done = True
    lane.queue(MODEL, running, running)
    lane.queue(MODEL, copied)
    device.settle(lane)
    assert lane.num_completed == 0
    running.done = True
    assert [flight.number for flight in lane.finished()] == [1, 2]


def ends(device: Device, flight: Flight, lane: int, now: float) -> bool:
    """The oldest step of a lane has run, as the stepper finds it; whether it had the device to itself."""
    own = device.lanes[lane]
    assert flight.step is not None
    flight.step.done = True  # type: ignore[attr-defined]
    assert next(own.finished()) is flight
    begin, own.last_end = max(flight.begin, own.last_end), now
    is_alone = had_device_alone(flight, begin, own, device.lanes)
    for other in device.lanes:
        for each in other.flights:
            each.look(now)
    return is_alone


def test_who_decodes_beside_another_lane_is_not_alone(device: Device) -> None:
    first, beside = turn(device, 0, FakeStep(1)), turn(device, 1, FakeStep(1))
    assert not ends(device, first, 0, now=1.0), "another one is queued"
    later = turn(device, 0, FakeStep(1))
    later.begin = 1.5
    assert not ends(device, beside, 1, now=2.0)
    assert not ends(device, later, 0, now=3.0), "another one has ended meanwhile"
    last = turn(device, 0, FakeStep(1))
    assert ends(device, last, 0, now=4.0)


def test_what_waits_behind_a_prompt_leaves_the_device_to_it(device: Device) -> None:
    """On two busy lanes decodes are queued during each prompt: none would count otherwise."""
    decode, prompt = turn(device, 0, FakeStep(1)), turn(device, 1, FakeStep(300))
    behind = turn(device, 0, FakeStep(1))
    assert ends(device, decode, 0, now=1.0)
    assert ends(device, prompt, 1, now=2.0)
    assert ends(device, behind, 0, now=3.0)


def test_pieces_of_a_step_that_is_apart_leave_nobody_alone(device: Device) -> None:
    idle, lane, other = device.lanes[2], device.lanes[0], device.lanes[1]
    idle.launched_apart(device.lanes)
    assert ends(device, turn(device, 2, FakeStep(1)), 2, now=1.0), "they have run before it was queued"
    before, beside = turn(device, 0, FakeStep(1)), turn(device, 1, FakeStep(1))
    lane.launched_apart(device.lanes)
    behind, next_one = turn(device, 0, FakeStep(1)), turn(device, 0, FakeStep(1))
    for flight in (before, behind, next_one):
        flight.begin = 1.0
    assert [each.is_beside for each in (before, beside, behind, next_one)] == [False, True, True, False]
    other.flights.clear()
    assert ends(device, before, 0, now=2.0)
    assert not ends(device, behind, 0, now=3.0)
    assert ends(device, next_one, 0, now=4.0)
