"""Work is done piece by piece, as far as what it needs is there."""

from __future__ import annotations

from prism.engine.pieces import Pieces, Work
from prism.engine.sampler import Sampled

FOREVER = float("inf")


def noted(done: list[str], gate: list[bool] | None = None) -> Work:
    done.append("inputs")
    yield 1
    done.append("embedding")
    yield 2
    done.append("layer")
    yield 3
    done.append("head")
    if gate is not None:
        yield lambda: gate[-1]
        done.append("draws")
        return Sampled([7], {})
    return None


def test_nothing_is_done_before_it_is_asked_for() -> None:
    done: list[str] = []
    pieces = Pieces(noted(done))
    assert not done and not pieces.is_begun and not pieces.is_complete
    assert pieces.advance(None, FOREVER)
    assert done == ["inputs", "embedding", "layer", "head"] and pieces.is_complete
    assert pieces.drawn is None and not pieces.advance(None, FOREVER)


def test_a_slice_without_time_is_one_piece() -> None:
    done: list[str] = []
    pieces = Pieces(noted(done))
    for count in range(1, 5):
        assert pieces.advance(None, 0.0) and len(done) == count
    assert pieces.is_complete and pieces.is_begun


def test_no_piece_runs_ahead_of_its_weights() -> None:
    done: list[str] = []
    pieces = Pieces(noted(done))
    assert pieces.advance(0, FOREVER) and done == ["inputs"]
    assert not pieces.advance(0, FOREVER)
    assert pieces.advance(2, FOREVER) and done == ["inputs", "embedding", "layer"]
    assert not pieces.advance(2, FOREVER) and not pieces.is_complete
    assert pieces.advance(3, FOREVER) and pieces.is_complete


def test_draws_on_the_host_come_when_the_logits_are_there() -> None:
    """The loop was held until the device had run the whole step."""
    done: list[str] = []
    gate = [False]
    pieces = Pieces(noted(done, gate))
    assert pieces.advance(None, FOREVER) and done[-1] == "head"
    assert not pieces.advance(None, FOREVER) and not pieces.is_complete
    gate.append(True)
    assert pieces.advance(None, 0.0) and pieces.is_complete
    assert pieces.drawn == Sampled([7], {})
