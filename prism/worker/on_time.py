"""Which of the waiting prompts can still have their first token in time. Pure.

Moore and Hodgson's algorithm ("An n job, one machine sequencing algorithm for minimizing the number of late
jobs", Management Science 15, 1968): take jobs in the order of their deadlines; whenever the newest would end
too late, give up the longest one taken so far. The result is a largest set of jobs that all end in time on
one machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

Job = tuple[float, float, float]
"""A prompt to compute, in seconds: when it is due, what it takes of the device, and when its model is there
at the earliest. A plain tuple, since thousands of them are made for each decision.
"""


class Selection(NamedTuple):
    """Places of jobs in what was given."""

    on_time: list[int]
    """By deadline; all of them end in time if they run in this order from the start on."""
    late: list[int]
    """The others, in the order given."""


def select(jobs: Sequence[Job], start: float) -> Selection:
    """The largest set that ends in time when the device is free from `start` on.

    1. What cannot be ready in time even if it runs first is late.
    2. The others by deadline, of equals the shortest first: each is added to what is to be done.
    3. When that ends after the newest deadline, the longest job so far is late.

    While a model is being loaded the device works for others, so a job that is not ready yet takes its place
    in the order all the same.
    """
    taken: list[tuple[float, int]] = []  # longest first
    is_late = [False] * len(jobs)
    end = start
    order = sorted(range(len(jobs)), key=jobs.__getitem__)
    for index in order:
        deadline, seconds, ready = jobs[index]
        if (ready if ready > start else start) + seconds > deadline:  # 1
            is_late[index] = True
            continue
        end += seconds  # 2
        heappush(taken, (-seconds, -index))  # of equals the last one given
        if end > deadline:  # 3
            longest, dropped = heappop(taken)
            end += longest
            is_late[-dropped] = True
    late = [index for index, flag in enumerate(is_late) if flag]
    return Selection([index for index in order if not is_late[index]], late)
