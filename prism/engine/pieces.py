"""A step's work in pieces, so that launching it never holds the loop for long.

Work is a generator. Before each piece it yields what that piece needs: so many groups of the model's weights
(`Layout.group_ends`: embedding, each layer, head), or that something has run on the device. Its result is
what was drawn on the host, if anything was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

from prism.engine.sampler import Sampled

Need = int | Callable[[], bool]
Work = Generator[Need, None, Sampled | None]


class Pieces:
    """How far a piece of work has come."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._need: Need = 0
        self.is_begun = False
        self.is_complete = False
        self.drawn: Sampled | None = None

    def advance(self, num_groups: int | None, seconds: float) -> bool:
        """Do the next piece, and more until `seconds` have passed; whether anything was done.

        Only pieces that make do with the first `num_groups` groups of weights; None are all. Nothing waits.
        """
        begin = time.perf_counter()
        has_advanced = False
        while not self.is_complete and self._is_possible(num_groups):
            self._do_piece()
            has_advanced = True
            if time.perf_counter() - begin >= seconds:
                break
        return has_advanced

    def _is_possible(self, num_groups: int | None) -> bool:
        if callable(self._need):
            return self._need()
        return num_groups is None or self._need <= num_groups

    def _do_piece(self) -> None:
        self.is_begun = True
        try:
            self._need = next(self._work)
        except StopIteration as stop:
            self.is_complete = True
            self.drawn = stop.value
