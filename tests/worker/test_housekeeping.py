"""What a worker does once nothing has been asked of it for a moment."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prism.worker import garbage
from prism.worker.housekeeping import CHECK_SECONDS, CHECK_SHARE, QUIET_SECONDS, Housekeeping


class Kept:
    """Housekeeping by a clock that the test moves; what it does, in turn."""

    def __init__(self, check_seconds: float = 0.0) -> None:
        self.now = 100.0
        self.done: list[str] = []
        self.check_seconds = check_seconds
        self.housekeeping = Housekeeping(self._check, lambda: self.now)

    def _check(self) -> None:
        self.done.append("check")
        self.now += self.check_seconds

    def idle_for(self, seconds: float) -> None:
        """The loop looks every half second."""
        end = self.now + seconds
        while self.now < end:
            self.housekeeping.idle()
            self.now += 0.5

    def count(self, what: str) -> int:
        return self.done.count(what)


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Kept]:
    def make(check_seconds: float = 0.0) -> Kept:
        kept = Kept(check_seconds)

        def look() -> None:
            kept.done.append("garbage")
            kept.now += 0.0625

        monkeypatch.setattr(garbage, "while_idle", look)
        return kept

    return make


def test_nothing_is_done_between_requests_that_follow_each_other(keep: Callable[..., Kept]) -> None:
    kept = keep()
    for _ in range(5):
        kept.idle_for(QUIET_SECONDS)
        kept.housekeeping.busy()
    assert not kept.done
    kept.idle_for(QUIET_SECONDS + 0.5)
    assert kept.done == ["garbage", "check"]


def test_a_quick_check_is_made_every_few_seconds(keep: Callable[..., Kept]) -> None:
    kept = keep(check_seconds=CHECK_SECONDS * CHECK_SHARE / 2)
    kept.idle_for(QUIET_SECONDS + 3 * CHECK_SECONDS)
    assert kept.count("check") == 3 and kept.count("garbage") > 10


def test_a_long_check_is_rare(keep: Callable[..., Kept]) -> None:
    kept = keep(check_seconds=0.1)
    kept.idle_for(QUIET_SECONDS + 3 * 0.1 / CHECK_SHARE)
    assert kept.count("check") == 3
