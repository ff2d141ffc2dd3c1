"""A progress bar that follows a model's load."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

POLL_SECONDS = 0.2


@contextmanager
def show_progress(admin: str, name: str) -> Iterator[None]:
    """While the block runs, show on a terminal how far the model has come."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(console, admin, name, done), daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _follow(console: Console, admin: str, name: str, done: threading.Event) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=1.0)
        while not done.wait(POLL_SECONDS):
            try:
                models = httpx.get(f"{admin.rstrip('/')}/admin/models", timeout=2, trust_env=False).json()[
                    "models"
                ]
            except (httpx.HTTPError, ValueError):
                continue
            report = next((m["report"] for m in models if m["model"] == name and m["report"]), None)
            if report is not None:
                share = report["load_progress"]
                progress.update(task, completed=share, description=f"{name} {report['state']}")
