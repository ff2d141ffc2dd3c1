"""When a worker looks for garbage: while nothing runs.

Counts of references free nearly all that a worker makes; what is left are cycles, of exceptions for one.
Python looks for them whenever so many objects have been made, and now and then at all that there are. Each KV
block that is used or cached is one, and all models' tokens wait meanwhile: 25 ms with 250,000 blocks.
"""

from __future__ import annotations

import gc

FEW = 100_000
"""New objects for which an idle worker does not look."""
MANY = 1_000_000
"""New objects for which a worker that is never idle looks all the same, at those alone."""


def take_over() -> None:
    """Python does not look by itself any more; what is there, most of it the libraries', is left out."""
    gc.collect()
    gc.freeze()
    gc.disable()


def while_idle() -> None:
    """Nothing runs, and nobody waits."""
    if num_new() > FEW:
        gc.collect()


def while_busy() -> None:
    """Something may run."""
    if num_new() > MANY:
        gc.collect(0)


def num_new() -> int:
    """Objects that were made and not freed since somebody last looked."""
    return gc.get_count()[0]
