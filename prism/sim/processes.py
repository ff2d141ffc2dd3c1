"""Processes for work that depends on nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread

from prism.sim.collecting import collect_rarely


@contextmanager
def process_pool(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Ends with the block; at once, whatever it is doing, if the block fails or is interrupted."""
    others = set(active_children())
    # spawn: whoever shows a progress bar has threads, which a fork would not survive
    pool = ProcessPoolExecutor(num_processes, get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BaseException:
        for child in set(active_children()) - others:
            child.terminate()
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
