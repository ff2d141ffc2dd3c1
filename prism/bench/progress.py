"""Shows on a terminal how far a run has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from prism.bench.outcomes import Record


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[Record], None]]:
    """While the block runs; it is given what to call with each request that has ended."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda record: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # a second between two pictures: drawing takes time that the client needs
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("", total=total)
        bad = 0

        def ended(record: Record) -> None:
            nonlocal bad
            bad += not record.is_finished
            done = progress.tasks[0].completed + 1
            progress.update(task, advance=1, description=f"{done:.0f} of {total} ended, {bad} not well")

        yield ended
