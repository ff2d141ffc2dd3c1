"""What moving a KV block costs and what computing it again does. Pure.

Speeds of copies are measured while the worker runs; until then they are guessed from the kind of device. What
computing costs is told by the model's steps (costs.py), for blocks of a typical prompt: late ones of a long
context cost more than the average, and are worth a little more than is assumed here.
"""

from __future__ import annotations

from dataclasses import dataclass

from prism.costs import StepCosts
from prism.types import Bytes, Seconds

WEIGHT = 0.2
"""Of the newest measurement in an average."""
TYPICAL_PROMPT = 1024
"""Tokens of the prompt that a block is taken to be a part of: what a step costs apart from them is shared by
all its blocks."""
LEAST_BYTES = 1 << 20
"""Of a copy whose time tells the link's speed."""


class Average:
    """A speed: a guess until it is measured, then an exponential average."""

    def __init__(self, guess: float) -> None:
        self.value = guess
        self.is_measured = False

    def add(self, amount: float, seconds: float) -> None:
        """So much in so much time; what took no time tells nothing."""
        if seconds <= 0 or amount <= 0:
            return
        speed = amount / seconds
        self.value = self.value + WEIGHT * (speed - self.value) if self.is_measured else speed
        self.is_measured = True


@dataclass(frozen=True, slots=True)
class BlockCosts:
    """Of one block of one model."""

    save: Seconds
    """To copy it to host memory."""
    fetch: Seconds
    """To copy it back."""
    compute: Seconds
    """To compute its tokens as a part of a prompt."""


def compute_seconds(steps: StepCosts, num_tokens: int) -> Seconds:
    """Of a block of so many tokens, as a part of a prompt."""
    return Seconds(steps.prefill(TYPICAL_PROMPT) * num_tokens / TYPICAL_PROMPT)


def block_costs(block_bytes: Bytes, compute: Seconds, *, saving: float, fetching: float) -> BlockCosts:
    """`saving` and `fetching` in bytes a second."""
    return BlockCosts(Seconds(block_bytes / saving), Seconds(block_bytes / fetching), compute)


def again(costs: BlockCosts, *, has_host: bool) -> float:
    """Seconds to have a block again that loses its place, by the quicker way."""
    return min(costs.compute, costs.save + costs.fetch) if has_host else costs.compute


def is_worth_saving(costs: BlockCosts) -> bool:
    """Both ways together are quicker than computing it again."""
    return costs.save + costs.fetch < costs.compute


def is_worth_fetching(costs: BlockCosts) -> bool:
    """It is there, so only the way back counts."""
    return costs.fetch < costs.compute
