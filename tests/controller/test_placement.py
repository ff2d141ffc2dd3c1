"""Homes by size."""

from __future__ import annotations

from prism.controller.placement import place
from prism.controller.state import DeviceSize, ModelSize
from prism.types import ModelId, WorkerId

SMALL_TOO = DeviceSize(WorkerId("worker-1"), 11)
SMALL, LARGE = DeviceSize(WorkerId("worker-0"), 11), DeviceSize(WorkerId("worker-1"), 30)


def homes(*sizes: int, devices: tuple[DeviceSize, ...] = (SMALL, LARGE)) -> list[str]:
    models = tuple(ModelSize(ModelId(f"m{i}"), size) for i, size in enumerate(sizes))
    placed = place(models, devices)
    assert list(placed) == [model.model for model in models]
    return [worker.removeprefix("worker-") for worker in placed.values()]


def test_the_largest_model_gets_the_largest_device() -> None:
    assert homes(4, 20) == ["0", "1"]


def test_more_than_fits_is_spread_by_share_of_memory() -> None:
    assert homes(10, 10, 10, 10) == ["1", "1", "0", "1"]


def test_a_model_goes_where_the_configuration_wants_it() -> None:
    models = (
        ModelSize(ModelId("free"), 30),
        ModelSize(ModelId("fixed"), 5, WorkerId("worker-1")),
    )
    placed = place(models, (SMALL, SMALL_TOO))
    assert placed == {ModelId("free"): WorkerId("worker-0"), ModelId("fixed"): WorkerId("worker-1")}


def test_one_device_is_everybodys_home() -> None:
    assert homes(5, 50, 0, devices=(SMALL,)) == ["0", "0", "0"]


def test_a_device_that_cannot_hold_a_model_is_not_its_home() -> None:
    """Weights of 2.1 slabs went to a device of two, where they could never be loaded."""
    two = DeviceSize(WorkerId("worker-0"), 20, 10)
    four = DeviceSize(WorkerId("worker-1"), 40, 10)
    assert homes(21, 21, 5, devices=(two, four)) == ["1", "1", "0"]
    assert homes(90, devices=(two, four)) == ["1"]
