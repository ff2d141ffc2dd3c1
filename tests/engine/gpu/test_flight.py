"""A step's way to the device: by the shortcut if there is one, else piece by piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prism.engine.gpu.flight import GpuFlight
from prism.engine.pieces import Work


class FakeEvent:
    def __init__(self) -> None:
        self.has_run = False

    def is_done(self) -> bool:
        return self.has_run

    def wait(self) -> None:
        self.has_run = True


class FakeLane:
    stream = None

    def __init__(self) -> None:
        self.events: list[FakeEvent] = []

    def event(self) -> FakeEvent:
        self.events.append(FakeEvent())
        return self.events[-1]


class Story:
    """What is done, in order."""

    def __init__(self, *, is_graph_there: bool = True) -> None:
        self.lane = FakeLane()
        self.done: list[str] = []
        self.is_graph_there = is_graph_there
        step: Any = object()
        lane: Any = self.lane
        tokens = torch.tensor([5, 6])
        self.flight = GpuFlight(step, (), tokens, lane, self.work(), self.shortcut)

    def shortcut(self) -> bool:
        if self.is_graph_there:
            self.done.append("all")
        return self.is_graph_there

    def work(self) -> Work:
        self.done.append("inputs")
        yield 3
        self.done.append("layers")
        return None


def test_the_shortcut_does_it_all_once() -> None:
    story = Story()
    flight = story.flight
    assert not flight.is_begun and flight.launch()
    assert flight.is_begun and flight.is_launched and not flight.is_done()
    assert not flight.launch() and story.done == ["all"] and len(story.lane.events) == 1
    assert flight.draws().tokens == [5, 6] and flight.is_done()


def test_without_the_graph_it_goes_piece_by_piece() -> None:
    story = Story(is_graph_there=False)
    while not story.flight.is_launched:
        assert story.flight.launch(None, 0.0)
    assert story.done == ["inputs", "layers"] and len(story.lane.events) == 1


@pytest.mark.parametrize("groups", [0, 2])
def test_behind_weights_that_arrive_there_is_no_shortcut(groups: int) -> None:
    """It needs all of them; begun in pieces, it goes on so."""
    story = Story()
    assert story.flight.launch(groups) and story.done == ["inputs"]
    assert not story.flight.launch(groups) and not story.flight.is_launched
    assert story.flight.launch() and story.done == ["inputs", "layers"] and story.flight.is_launched
