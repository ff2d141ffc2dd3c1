"""Processes for work that depends on nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread

from prism.errors import ProcessDied
from prism.sim.collecting import collect_rarely


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def process_pool(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Ends with the block; at once, whatever it is doing, if the block fails or is interrupted.

    Raises `ProcessDied` if one of the processes has been killed.
    """
    others = set(active_children())
    # spawn: whoever shows a progress bar has threads, which a fork would not survive
    pool = ProcessPoolExecutor(num_processes, get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BaseException as error:
        for child in set(active_children()) - others:  # the pool forgets one that is just being started
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise ProcessDied("a process that simulates has died, perhaps for want of memory") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """An interrupt is the parent's affair: it ends its children. One that is killed cannot, and they end
    themselves: they would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    collect_rarely()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
