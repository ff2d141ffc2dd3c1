"""Logging of all processes: lines for people, or JSON for machines.

A record's fields are given as `extra={"request_id": ..., "worker": ...}`; both formats show all of them.
"""

from __future__ import annotations

import json as json_module
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

LIBRARIES = ("uvicorn", "asyncio")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup(level: str, json: bool, stream: TextIO | None = None) -> None:
    """Send what the package `prism` logs to `stream` (standard error), and nothing anywhere else.

    Beside it the errors of the libraries that serve. uvicorn's warnings are about clients: each of them could
    write as many lines as it likes.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if json else TextFormatter())
    levels = {"prism": level.upper()} | dict.fromkeys(LIBRARIES, "ERROR")
    for name, least in levels.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


class TextFormatter(logging.Formatter):
    """`time LEVEL part: message key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback if there is one. A message cannot make lines of its own."""
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        part = record.name.removeprefix("prism.")
        message = f"{record.getMessage()}{fields}".replace("\r", "\\r").replace("\n", "\\n")
        line = f"{_time(record)} {record.levelname} {part}: {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record with its fields beside the message."""
        values = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "part": record.name.removeprefix("prism."),
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json_module.dumps(values, ensure_ascii=False, default=str)
