from __future__ import annotations

from prism.agent.backoff import LONGEST_DELAY, Backoff


def test_what_worked_for_a_while_starts_again_at_once() -> None:
    backoff = Backoff()
    assert backoff.delay(lived=5.0) == 0.0


def test_quick_ends_wait_ever_longer_until_one_works() -> None:
    backoff = Backoff()
    delays = [backoff.delay(lived=0.1) for _ in range(8)]
    assert delays == sorted(delays) and delays[0] > 0 and delays[-1] == LONGEST_DELAY
    assert backoff.delay(lived=3.0) == 0.0
    assert backoff.delay(lived=0.1) == delays[0]


def test_only_what_never_worked_is_given_up() -> None:
    """A worker that was killed while it started again, three times, took the whole server down."""
    backoff = Backoff()
    backoff.delay(lived=1.0)
    for _ in range(5):
        backoff.delay(lived=None)
    assert not backoff.never_starts
    hopeless = Backoff()
    for _ in range(3):
        assert not hopeless.never_starts
        hopeless.delay(lived=None)
    assert hopeless.never_starts
