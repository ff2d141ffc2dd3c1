"""Steps are launched in slices: lanes take turns, a lane keeps its order, and prompts are not run beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.checkpoints import make_model, prompts, reference, save
from tests.support.late import LateBackend, LateFlight
from tests.support.local_worker import LocalWorker

A, B = "llama", "qwen3"
FAMILIES = (A, B)
PROMPT = (prompts(1, 90)[0] * 90)[:90]
NUM_TOKENS = 24


class Slice(NamedTuple):
    """A launch that came to something."""

    lane: int
    number: int
    has_prompts: bool
    is_first: bool
    is_last: bool
    half_launched_prompts: int
    """On other lanes at that moment."""


@pytest.fixture
def start(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[LocalWorker, list[Slice]]]]:
    """A worker on two lanes with a model loaded on each, and what it launches from then on."""
    folder = tmp_path_factory.mktemp("models")
    paths: dict[str, Path] = {
        name: save(make_model(name, seed=i), folder / name) for i, name in enumerate(FAMILIES)
    }
    local = LocalWorker(paths, 16, backend=LateBackend())
    for name in FAMILIES:
        local.submit(f"warm-{name}", name, [1, 2, 3], max_tokens=1)
        local.run()
    seen: list[Slice] = []
    launch = LateFlight.launch

    def watched(flight: LateFlight, num_groups: int | None = None, seconds: float = float("inf")) -> bool:
        is_first = not flight.is_begun
        (lane,) = (lane for lane in local.device.lanes if any(f.work is flight for f in lane.flights))
        (number,) = (f.number for f in lane.flights if f.work is flight)
        others = [f for other in local.device.lanes if other is not lane for f in other.flights]
        half = sum(f.has_prompts and not f.is_launched for f in others)
        has_advanced = launch(flight, num_groups, seconds)
        if has_advanced:
            has_prompts = flight.step.has_prompts
            seen.append(Slice(lane.lane_id, number, has_prompts, is_first, flight.is_launched, half))
        return has_advanced

    monkeypatch.setattr(LateFlight, "launch", watched)
    yield lambda: (local, seen)
    local.close()


def right(local: LocalWorker, request_id: str, name: str, prompt: list[int] = PROMPT) -> bool:
    expected = reference(make_model(name, seed=FAMILIES.index(name)), prompt, NUM_TOKENS)
    return local.outbox.tokens.get((request_id, 0)) == expected


def test_no_round_launches_more_than_a_slice_of_each_lane(start: Any) -> None:
    local, seen = start()
    for name in FAMILIES:
        local.submit(name, name, PROMPT, max_tokens=NUM_TOKENS)
    while len(local.worker.requests):
        before = len(seen)
        local.pump()
        lanes = [piece.lane for piece in seen[before:]]
        assert len(lanes) == len(set(lanes))
    assert all(right(local, name, name) for name in FAMILIES)


def test_lanes_take_turns_in_launching_decodes(start: Any) -> None:
    local, seen = start()
    for name in FAMILIES:
        local.submit(name, name, PROMPT, max_tokens=NUM_TOKENS)
    local.run()
    between = 0
    for place, piece in enumerate(seen):
        if piece.is_first and not piece.has_prompts:
            rest = seen[place + 1 :]
            end = next(i for i, p in enumerate(rest) if (p.lane, p.number) == piece[:2] and p.is_last)
            between += any(p.lane != piece.lane for p in rest[:end])
    assert between > NUM_TOKENS // 2


def test_a_lane_launches_one_step_after_the_other(start: Any) -> None:
    local, seen = start()
    for i in range(4):
        local.submit(str(i), A, PROMPT[i:], max_tokens=NUM_TOKENS)
    local.run()
    numbers = [piece.number for piece in seen]
    assert numbers == sorted(numbers) and sum(p.is_first for p in seen) == sum(p.is_last for p in seen)
    assert all(right(local, str(i), A, PROMPT[i:]) for i in range(4))


def test_nothing_begins_beside_a_prompt_that_is_half_launched(start: Any) -> None:
    """A neighbour's step waits for it, on the host without holding the loop, then on the device."""
    local, seen = start()
    local.submit("neighbour", A, PROMPT, max_tokens=NUM_TOKENS)
    local.run(until=lambda: len(local.outbox.tokens.get(("neighbour", 0), ())) > 4)
    for i in range(6):
        local.submit(str(i), B, PROMPT[i:], max_tokens=NUM_TOKENS)
    local.run()
    assert any(piece.has_prompts for piece in seen)
    assert not any(piece.half_launched_prompts for piece in seen if piece.is_first)
    assert right(local, "neighbour", A) and all(right(local, str(i), B, PROMPT[i:]) for i in range(6))


def test_a_model_whose_step_is_half_launched_can_be_evicted(start: Any) -> None:
    """The rest is launched first: the tokens of queued steps are committed, none is lost or drawn twice."""
    local, _ = start()
    local.submit("r", A, PROMPT, max_tokens=NUM_TOKENS)
    local.submit("other", B, PROMPT, max_tokens=NUM_TOKENS)
    model = local.worker.models[A]
    for _ in range(200):
        local.pump()
        launching = model.lane and model.lane.launching
        if len(local.outbox.tokens.get(("r", 0), ())) > 3 and launching and launching.step.is_begun:
            break
    else:
        raise AssertionError("never half launched")
    local.worker.evict(model)
    local.check()
    assert not model.is_active
    local.run()
    assert right(local, "r", A) and right(local, "other", B)


def test_who_is_cancelled_half_way_disturbs_nobody(start: Any) -> None:
    local, seen = start()
    for i in range(3):
        local.submit(str(i), A, PROMPT[i:], max_tokens=NUM_TOKENS)
    local.run(until=lambda: bool(seen) and seen[-1].has_prompts and not seen[-1].is_last)
    local.cancel("1")
    local.check()
    local.submit("late", A, PROMPT[5:], max_tokens=NUM_TOKENS)
    local.run()
    assert ("1", 0) not in local.outbox.tokens
    assert right(local, "0", A) and right(local, "2", A, PROMPT[2:]) and right(local, "late", A, PROMPT[5:])
