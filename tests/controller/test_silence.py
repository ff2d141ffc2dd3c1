"""Workers that are up and do not report, or hang."""

from __future__ import annotations

import pytest

from prism.controller.silence import SILENT_SECONDS, Silence
from prism.types import Seconds, WorkerId

A, B, NOBODY_WATCHES = (WorkerId(f"worker-{i}") for i in range(3))


def look_until(silence: Silence, since: float, until: float) -> list[frozenset[WorkerId]]:
    """Each second, as the controller does."""
    return [silence.look(now) for second in range(int(until - since)) if (now := since + second + 1)]


def test_each_silence_is_told_once() -> None:
    silence = Silence({})
    silence.look(100.0)
    silence.heard(A, 100.0)
    told = look_until(silence, 100.0, 100.0 + SILENT_SECONDS + 5)
    assert [workers for workers in told if workers] == [{A}]
    assert silence.workers == {A}
    assert silence.heard(A, 120.0) and not silence.heard(A, 120.5)
    assert not silence.workers


def test_who_has_ended_is_not_silent() -> None:
    silence = Silence({})
    silence.look(100.0)
    for worker in (A, B):
        silence.heard(worker, 100.0)
    silence.ended(B)
    look_until(silence, 100.0, 100.0 + SILENT_SECONDS)
    assert silence.workers == {A}
    silence.ended(A)
    assert not silence.workers


def test_a_controller_that_stood_still_itself_blames_nobody() -> None:
    """Reports of that time may be in its sockets still."""
    silence = Silence({})
    silence.look(100.0)
    silence.heard(A, 100.0)
    assert not silence.look(100.0 + 6 * SILENT_SECONDS)
    assert not silence.workers


def test_who_hangs_is_told_once_and_each_by_its_own_time() -> None:
    silence = Silence({A: Seconds(30.0), B: Seconds(60.0)})
    silence.look(100.0)
    for worker in (A, B, NOBODY_WATCHES):
        silence.heard(worker, 100.0)
    told = []
    for now in range(101, 201):
        silence.look(now)
        told += [(now, *hung) for hung in silence.hung(now).items()]
    assert told == [(130, A, 30.0), (160, B, 60.0)]


@pytest.mark.parametrize("comes_up", [True, False])
def test_who_has_come_back_may_hang_again(comes_up: bool) -> None:
    """A process that was killed and its successor, or one that went on."""
    silence = Silence({A: Seconds(30.0)})
    silence.heard(A, 100.0)
    assert silence.hung(130.0) and not silence.hung(131.0)
    if comes_up:
        silence.ended(A)
        assert not silence.hung(300.0)
    silence.heard(A, 300.0)
    assert not silence.hung(329.0) and silence.hung(330.0) == {A: 30.0}


def test_nobody_hangs_of_whom_a_controller_could_not_hear() -> None:
    silence = Silence({A: Seconds(30.0)})
    silence.look(100.0)
    silence.heard(A, 100.0)
    silence.look(160.0)
    assert not silence.hung(160.0)
