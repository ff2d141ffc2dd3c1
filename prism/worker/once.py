"""What several threads may want at a time and is to be done once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock


@dataclass(slots=True)
class _Entry:
    what: object
    is_done: bool = False
    lock: Lock = field(default_factory=Lock)


class Once:
    """By what it is done for, which need not be hashable."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._entries: list[_Entry] = []

    def do(self, what: object, work: Callable[[], None]) -> None:
        """Returns when `work` has been done for something equal. After a failure the next one tries again."""
        with self._lock:
            entry = next((entry for entry in self._entries if entry.what == what), None)
            if entry is None:
                entry = _Entry(what)
                self._entries.append(entry)
        with entry.lock:
            if not entry.is_done:
                work()
                entry.is_done = True
