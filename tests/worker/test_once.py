"""Done once, whoever wants it."""

from __future__ import annotations

import threading

import pytest

from prism.worker.once import Once


def test_who_comes_meanwhile_waits_and_does_not_do_it_again() -> None:
    once, begun, may_end, done = Once(), threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        assert may_end.wait(10)
        done.append("slow")

    first = threading.Thread(target=once.do, args=(["a"], work))
    first.start()
    assert begun.wait(10)
    second = threading.Thread(target=once.do, args=(["a"], lambda: done.append("again")))
    second.start()
    once.do(["b"], lambda: done.append("other"))
    assert done == ["other"], "nobody waits for what is done for others"
    second.join(0.05)
    assert second.is_alive()
    may_end.set()
    for thread in (first, second):
        thread.join(10)
    once.do(["a"], lambda: done.append("again"))
    assert done == ["other", "slow"]


def test_what_fails_is_tried_again() -> None:
    once, done = Once(), []

    def fail() -> None:
        raise ValueError("in vain")

    with pytest.raises(ValueError, match="in vain"):
        once.do("a", fail)
    once.do("a", lambda: done.append("now"))
    once.do("a", fail)
    assert done == ["now"]
