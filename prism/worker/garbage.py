"""When a worker looks for garbage: while nothing runs.

Counts of references free nearly all that a worker makes; what is left are objects that hold each other.
Python looks for such when so many have been made, now and then among all that there are. KV blocks, used or
cached, are objects, too: all models' tokens wait for 25 to 40 ms when there are 250,000 of them.
"""

from __future__ import annotations

import gc

NEW_WHEN_IDLE = 100_000
"""New objects for which an idle worker looks; some 10 ms for these, and as above for older ones."""
NEW_WHEN_BUSY = 1_000_000
"""New objects for which a worker that is never idle looks, among these alone: 0.15 s. All KV blocks of a
device and their requests are fewer: only what nobody frees amounts to so many."""


def take_over() -> None:
    """Python does not look by itself any more; what is there, most of it the libraries', is left out."""
    gc.collect()
    gc.freeze()
    gc.disable()


def while_idle() -> None:
    """Nothing runs, and nobody waits."""
    if num_new() > NEW_WHEN_IDLE:
        gc.collect()


def while_busy() -> None:
    """Something may run. What is found to be in use waits for an idle moment to be looked at again."""
    if num_new() > NEW_WHEN_BUSY:
        gc.collect(0)


def num_new() -> int:
    """Objects made since somebody last looked, less those freed, older ones included; not below 0."""
    return gc.get_count()[0]
