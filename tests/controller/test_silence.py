"""Workers that are up and do not report."""

from __future__ import annotations

from prism.controller.silence import SILENT_SECONDS, Silence
from prism.types import WorkerId

A, B = WorkerId("worker-0"), WorkerId("worker-1")


def look_until(silence: Silence, since: float, until: float) -> list[frozenset[WorkerId]]:
    """Each second, as the controller does."""
    return [silence.look(now) for second in range(int(until - since)) if (now := since + second + 1)]


def test_each_silence_is_told_once() -> None:
    silence = Silence()
    silence.look(100.0)
    silence.heard(A, 100.0)
    told = look_until(silence, 100.0, 100.0 + SILENT_SECONDS + 5)
    assert [workers for workers in told if workers] == [{A}]
    assert silence.workers == {A}
    assert silence.heard(A, 120.0) and not silence.heard(A, 120.5)
    assert not silence.workers


def test_who_has_ended_is_not_silent() -> None:
    silence = Silence()
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
    silence = Silence()
    silence.look(100.0)
    silence.heard(A, 100.0)
    assert not silence.look(100.0 + 6 * SILENT_SECONDS)
    assert not silence.workers
