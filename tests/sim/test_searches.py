"""Searches on several processes: the same results, and nothing is left running when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import psutil
import pytest

from prism.errors import ConfigError, ProcessDied
from prism.modes import Mode
from prism.sim.plan import Planner, Target, Trial, steps
from prism.sim.processes import process_pool
from prism.sim.searches import Search, carry_out
from tests.sim.test_plan import cluster
from tests.support.waiting import wait_until

TARGET = Target(0.9, 0.9)


@pytest.fixture(autouse=True)
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes take part, however few requests there are."""
    monkeypatch.setattr("prism.sim.cluster.FEW", 0)


def searches() -> dict[Mode, Search]:
    return {
        mode: Search(Planner(cluster(mode), TARGET), steps(TARGET, 4)) for mode in (Mode.PRISM, Mode.ELASTIC)
    }


def test_processes_find_what_one_finds() -> None:
    heard: dict[int, list[tuple[Mode, int, Trial]]] = {1: [], 3: []}
    plans = [carry_out(searches(), num, lambda *args, n=num: heard[n].append(args)) for num in heard]
    assert plans[0] == plans[1] and list(plans[0]) == list(plans[1])
    for mode in plans[0]:
        of_mode = [[trial for trial in trials if trial[0] is mode] for trials in heard.values()]
        assert of_mode[0] == of_mode[1] and of_mode[0]
    assert not active_children()


class Broken(Planner):
    """One attempt fails, the other one takes very long."""

    def attempts(self, devices: int) -> list[Callable[[], Trial]]:
        return [partial(_sleep, 600.0), _fail]


def _sleep(seconds: float) -> Trial:
    time.sleep(seconds)
    raise AssertionError("it was waited for")


def _fail() -> Trial:
    raise ConfigError(["there is no such thing"])


def test_what_fails_in_a_process_is_told_at_once_and_ends_the_others() -> None:
    search = Search(Broken(cluster(Mode.STATIC), TARGET), steps(TARGET, 4))
    with pytest.raises(ConfigError, match="no such thing"):
        carry_out({0: search}, 2, lambda *_: None)
    assert not active_children()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_told() -> None:
    """As when memory runs out. It ended in a traceback of the library's."""
    with pytest.raises(ProcessDied, match="has died"), process_pool(1) as pool:
        pool.submit(_die).result()
    assert not active_children()


def test_an_interrupt_ends_the_processes() -> None:
    """Whatever the others are at: it took as long as their runs."""
    found = {0: Search(Planner(cluster(Mode.STATIC), TARGET), steps(TARGET, 4))}
    found[1] = Search(Slow(cluster(Mode.STATIC), TARGET), steps(TARGET, 4))

    def interrupt(key: int, devices: int, trial: Trial) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(found, 2, interrupt)
    assert not active_children()


PARENT = """
import os, time
from prism.sim.processes import process_pool
if __name__ == "__main__":
    with process_pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600.0)
"""


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """They waited for work for ever."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    wait_until(lambda: _has_ended(child), "the child's end")


def _has_ended(process: psutil.Process) -> bool:
    """Perhaps nobody has asked for its status yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


class Slow(Planner):
    """Takes very long."""

    def attempts(self, devices: int) -> list[Callable[[], Trial]]:
        return [partial(_sleep, 600.0)]
