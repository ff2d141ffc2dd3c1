"""Loops that stand still are counted, and told from time to time."""

from __future__ import annotations

import logging

import pytest

from prism.stalls import TELL_SECONDS, Stalls


class CoreTime:
    seconds = 5.0

    def __call__(self) -> float:
        return self.seconds


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return found


def test_the_first_is_told_at_once_with_what_its_thread_did_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    core_time = CoreTime()
    stalls = Stalls("worker-0", core_time)
    stalls.tell(100.0)
    core_time.seconds += 0.125
    stalls.note(0.75, "somebody", 101.0)
    stalls.tell(101.25)
    assert lines(caplog) == [
        "worker-0 stood still for up to 0.75 s (somebody; its loop had a core for 0.12 of the last 1.00 s); "
        "times since the last such line: 1"
    ]


def test_others_are_told_together_when_the_time_has_come_though_none_follows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stalls = Stalls("worker-0", CoreTime())
    stalls.note(0.5, "first", 100.0)
    stalls.tell(100.0)
    assert len(lines(caplog)) == 1
    for seconds, cause in ((0.3, "short"), (4.0, "long"), (1.0, "last")):
        stalls.note(seconds, cause, 102.0)
        stalls.tell(102.0)
    stalls.tell(99.9 + TELL_SECONDS)
    assert lines(caplog) == []
    stalls.tell(100.0 + TELL_SECONDS)
    (line,) = lines(caplog)
    assert "for up to 4.00 s (long;" in line
    assert line.endswith(": 3")
    stalls.tell(100.0 + 3 * TELL_SECONDS)
    assert lines(caplog) == []
    assert (stalls.num_stalls, stalls.seconds) == (4, 5.8)
