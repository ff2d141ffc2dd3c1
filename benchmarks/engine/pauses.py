"""What is slower behind a pause: a core's arithmetic, its caches, or objects all over the heap.

Usage: python benchmarks/engine/pauses.py [--output results.json]
A worker's loop waits for a GPU between two steps. Here it turns or sleeps for so long, and then does one of:
`arithmetic`, 6,000 turns of a loop that touches nothing; `objects`, seven numbers of each of 512 objects, as
a step has sequences; sums of arrays by their size. Medians in microseconds, on one core.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

KIB = (24, 256, 1024, 4096)
"""Of arrays: within the first cache, the second, and the last."""

clock = time.perf_counter


class Sequence:
    """As large as an engine's, and as far from its neighbours."""

    def __init__(self) -> None:
        self.numbers = [random.randrange(10**6, 10**9) for _ in range(40)]
        self.first, self.second, self.third, self.fourth = self.numbers[:4]
        self.others = bytearray(random.randrange(500, 6000))


def turn(seconds: float) -> None:
    """Keep the core busy."""
    end = clock() + seconds
    while clock() < end:
        pass


def look(seconds: float) -> None:
    """Sleep as a worker's loop does between two looks at its device."""
    end = clock() + seconds
    while clock() < end:
        time.sleep(20e-6)


def works() -> dict[str, Callable[[], object]]:
    """What is done behind the pauses."""
    sequences = [Sequence() for _ in range(512)]

    def arithmetic() -> int:
        total = 0
        for i in range(6000):
            total += i & 7
        return total

    def objects() -> int:
        total = 0
        for s in sequences:
            total += s.first + s.second + s.third + s.fourth + s.numbers[3] + s.numbers[17] + s.numbers[39]
        return total

    generator = np.random.default_rng(0)
    arrays = {f"sum of {kib} KiB": generator.integers(0, 9, kib * 128) for kib in KIB}
    return {"arithmetic": arithmetic, "objects": objects} | {name: a.sum for name, a in arrays.items()}


def microseconds(work: Callable[[], object], pause: Callable[[], object], count: int) -> float:
    """Median of the work behind a pause."""
    times = []
    for _ in range(count):
        pause()
        begin = clock()
        work()
        times.append(clock() - begin)
    return round(statistics.median(times) * 1e6, 1)


def main() -> None:
    """Prints a line for each pause."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    random.seed(0)
    todo, results = works(), []

    def report(pause: str, found: dict[str, float]) -> None:
        results.append({"pause": pause, "us": found})
        print(json.dumps(results[-1]), flush=True)

    report("none", {name: microseconds(work, work, 40) for name, work in todo.items()})
    for milliseconds in (7, 29):
        for how in (turn, look):
            wait = partial(how, milliseconds / 1e3)
            found = {name: microseconds(work, wait, 20) for name, work in todo.items()}
            report(f"{how.__name__}, {milliseconds} ms", found)

    def turn_and_touch() -> None:
        turn(0.029)
        todo["objects"]()

    report("turn, 29 ms, and the same work", {"objects": microseconds(todo["objects"], turn_and_touch, 20)})
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
