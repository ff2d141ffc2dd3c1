"""How likely what a model holds is needed again soon, from what has been seen of it. Pure.

Memory that is taken is held for some seconds, so *soon* is the same for all that could be given up: within
`HORIZON`. How long something has not been used tells most: times between uses have long tails, so the longer
a gap has lasted, the longer it goes on. Where nothing is known, it outlasts `x` seconds with probability
`1 / (1 + x / PRIOR)` (Lomax). A model's own gaps replace that as they are seen, in a histogram, as in the
policies that decide how long functions of serverless platforms are kept warm (Shahrad et al., "Serverless in
the Wild", ATC '20).
"""

from __future__ import annotations

from bisect import bisect_left
from math import exp, log2

HORIZON = 10.0
"""Seconds that memory is held, roughly: as long as a request takes."""
PRIOR = 10.0
"""Seconds that half of all gaps outlast, before any were seen."""
WEIGHT = 2.0
"""Of what is believed beforehand, in gaps."""
FORGETTING = 0.95
"""What a gap still weighs when another one has been seen."""
BANKED = 8
"""Tokens that a stream may be ahead of its objective."""
LEAST_TOKENS = 4096.0
"""Of prompts, that a prefix cache is believed to have had all of, before any were looked up."""
MOST_TOKENS = 1e6
"""Of prompts that are remembered."""
LEAST_GAP = 1 / 64
NUM_BUCKETS = 24
"""Each twice as long as the one before; the last one begins after a day and a half."""
TYPICAL_OUTPUT = 128.0
"""Tokens of an answer, before any was seen."""
GROWTH = 0.5
"""Of the output that is expected of all sequences, what memory is kept for: when one is long, others end."""
OUTPUT_WEIGHT = 0.05
"""Of the newest answer in their average."""
LEAST_STEP = 1.0
"""Seconds between two readings of the latest serial number."""
READINGS = 64


def outlasts(seconds: float) -> float:
    """The probability that a gap of which nothing is known lasts longer."""
    return 1 / (1 + seconds / PRIOR)


def reuse_chance(age: float) -> float:
    """The probability that a cached block is used within `HORIZON`, `age` seconds after its last use."""
    return 1 - outlasts(age + HORIZON) / outlasts(age)


class IdleTimes:
    """Gaps between the work of one model: how long it was idle each time."""

    def __init__(self) -> None:
        self._counts = [0.0] * NUM_BUCKETS
        self._total = 0.0

    def add(self, seconds: float) -> None:
        """It has work again after so long."""
        self._counts = [count * FORGETTING for count in self._counts]
        place = 0 if seconds <= LEAST_GAP else min(NUM_BUCKETS - 1, int(log2(seconds / LEAST_GAP)) + 1)
        self._counts[place] += 1.0
        self._total = self._total * FORGETTING + 1.0

    def return_chance(self, age: float, threshold: float | None = None) -> float:
        """The probability that a model which has been idle for `age` seconds has work within `HORIZON`.

        With a `threshold`, the published rule instead: certain before it, impossible from then on.
        """
        if threshold is not None:
            return 0.0 if age >= threshold else 1.0
        now = self._outlasting(age)
        return 1 - self._outlasting(age + HORIZON) / now

    def _outlasting(self, seconds: float) -> float:
        """Gaps that last longer, of those seen and those believed; within a bucket evenly spread."""
        seen = 0.0
        for place, count in enumerate(self._counts):
            if count:
                begin = 0.0 if place == 0 else LEAST_GAP * 2.0 ** (place - 1)
                end = LEAST_GAP * 2.0**place
                seen += count * min(1.0, max(0.0, (end - seconds) / (end - begin)))
        return seen + WEIGHT * outlasts(seconds)


class UseTimes:
    """When blocks were last used, from their serial numbers: a clock beside a cache that knows no time.

    Its readings lie the further apart the older they are, so that a few of them reach back for weeks.
    """

    def __init__(self) -> None:
        self._levels: list[list[tuple[int, float]]] = [[]]
        """(serial number, time); each level is older than the one before, its readings twice as far apart."""
        self._last = (0, 0.0)
        """The latest reading, kept or not."""

    def saw(self, serial: int, now: float) -> None:
        """Serial numbers up to this one have been given out by now."""
        self._last = (serial, now)
        newest = self._levels[0]
        if newest and now - newest[-1][1] < LEAST_STEP:
            return
        newest.append((serial, now))
        for level, readings in enumerate(self._levels):
            if len(readings) <= READINGS:
                return
            if level + 1 == len(self._levels):
                self._levels.append([])
            self._levels[level + 1].append(readings[0])
            del readings[:2]

    def age(self, serial: int, now: float) -> float:
        """Seconds since this number was given out, or up to a few per cent less; 0 if that was just now."""
        later = self._last[1] if serial <= self._last[0] else now
        for readings in self._levels:
            if readings and readings[0][0] < serial:
                place = bisect_left(readings, (serial, 0.0))
                return now - (readings[place][1] if place < len(readings) else later)
            later = readings[0][1] if readings else later
        return max(0.0, now - later)


class CacheHits:
    """What a model's prefix cache has had of the tokens of its prompts.

    Blocks of a cache that nobody has used again are not going to be: how long one has lain there does not
    tell whether its model's prompts have anything in common.
    """

    def __init__(self) -> None:
        self._looked_up = self._found = LEAST_TOKENS
        self._last = (0, 0)

    def saw(self, looked_up: int, found: int) -> None:
        """So many tokens since the worker started."""
        before, self._last = self._last, (looked_up, found)
        self._looked_up += looked_up - before[0]
        self._found += found - before[1]
        if self._looked_up > MOST_TOKENS:
            self._looked_up, self._found = self._looked_up / 2, self._found / 2

    @property
    def share(self) -> float:
        """Of its prompts' tokens, 1 at most."""
        return min(1.0, self._found / self._looked_up)


class OutputLengths:
    """How long a model's answers are."""

    def __init__(self) -> None:
        self._mean = TYPICAL_OUTPUT
        self._count = 0

    def add(self, tokens: int) -> None:
        """An answer has come to its end."""
        self._count += 1
        self._mean += max(OUTPUT_WEIGHT, 1 / (self._count + 1)) * (tokens - self._mean)

    @property
    def expected_rest(self) -> float:
        """Tokens that a sequence is still going to draw, however many it has: its end is thought to be as
        likely at each token, as lengths have long tails."""
        return self._mean


class RecentDemand:
    """Slabs that have been asked of others lately: about as many are going to be."""

    def __init__(self) -> None:
        self._slabs = 0.0
        self._time = 0.0

    def add(self, slabs: int, now: float) -> None:
        """So many more."""
        self._slabs = self.within_horizon(now) + slabs
        self._time = now

    def within_horizon(self, now: float) -> float:
        """Those of the last `HORIZON` seconds, older ones fading."""
        return self._slabs * exp(-max(0.0, now - self._time) / HORIZON)
