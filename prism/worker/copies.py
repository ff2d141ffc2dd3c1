"""Copies between device and host memory, as values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from prism.types import Address, Bytes


class Run(NamedTuple):
    """Copy so many bytes."""

    source: Address
    target: Address
    size: Bytes


class CopyWork(Protocol):
    """Copies that have been queued."""

    def is_done(self) -> bool:
        """They have run."""
        ...

    def seconds(self) -> float:
        """How long they ran, once they have; 0 if nobody knows."""
        ...


class Grid(NamedTuple):
    """Memory whose pieces of this size the driver knows one by one: no copy crosses from one to the next."""

    base: Address
    piece: Bytes


def merged(runs: Iterable[Run]) -> list[Run]:
    """Neighbours on both sides become one copy."""
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        if last is not None and (last.source + last.size, last.target + last.size) == run[:2]:
            found[-1] = Run(last.source, last.target, Bytes(last.size + run.size))
        else:
            found.append(run)
    return found


def cut(runs: Iterable[Run], source: Grid, target: Grid) -> Iterator[Run]:
    """The same copies, none of which crosses a border on either side."""
    for begin, end, size in runs:
        done = 0
        while done < size:
            step = min(
                size - done,
                source.piece - (begin + done - source.base) % source.piece,
                target.piece - (end + done - target.base) % target.piece,
            )
            yield Run(Address(begin + done), Address(end + done), Bytes(step))
            done += step
