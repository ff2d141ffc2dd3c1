"""Lanes: what is queued comes out in order, and prompts share the device with nobody."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prism.engine.runner import Done
from prism.engine.scheduler import Chunk, Slots, Step
from prism.memory.host import HostDriver
from prism.memory.pool import SlabPool
from prism.types import Bytes, LaneId, MiB, ModelId
from prism.worker.cpu_device import TorchBackend
from prism.worker.device import Device
from prism.worker.lanes import Lane

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


def step(*lengths: int) -> Step:
    return Step(tuple(Chunk(None, 0, length, True) for length in lengths), ())  # type: ignore[arg-type]


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


def test_decodes_run_side_by_side_and_prompts_alone(device: Device) -> None:
    backend = device.backend
    assert isinstance(backend, RecordingBackend)
    decode, prompt = Done(step(1, 1), (), []), Done(step(1, 300), (), [])
    device.lanes[0].queue(MODEL, decode, decode)
    device.take_turns(device.lanes[1], decode.step)
    assert backend.waits == []
    device.take_turns(device.lanes[1], prompt.step)
    assert backend.waits == [(1, [decode])]
    device.lanes[1].queue(MODEL, prompt, prompt)
    device.take_turns(device.lanes[2], decode.step)
    assert backend.waits[1:] == [(2, [prompt])]


def test_models_spread_over_lanes(device: Device) -> None:
    assert [device.bind().lane_id for _ in range(4)] == [0, 1, 2, 0]


def test_copies_are_settled_only_behind_steps(device: Device) -> None:
    lane = device.lanes[0]
    running, copied = Work(), Work()
    copied.done = True
    lane.queue(MODEL, running, Done(step(1), (), []))
    lane.queue(MODEL, copied)
    device.settle(lane)
    assert lane.num_completed == 0
    running.done = True
    assert [flight.number for flight in lane.finished()] == [1, 2]
