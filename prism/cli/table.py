"""Prints models and devices as tables."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 2**20


def print_models(answer: dict[str, Any], *, as_json: bool) -> None:
    """`prism ps`."""
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    console = Console()
    for device in answer["devices"]:
        total = device["num_slabs"] * device["slab_bytes"]
        free = device["num_free_slabs"] * device["slab_bytes"]
        console.print(
            f"{device['worker']} on {device['device']}: {_mib(total)} in slabs of "
            f"{_mib(device['slab_bytes'])}, {_mib(free)} free"
        )
    console.print(models_table(answer))


def models_table(answer: dict[str, Any]) -> Table:
    """One row a model. Memory in MiB."""
    table = Table(box=None, pad_edge=False)
    for name in ("MODEL", "WORKER", "STATE"):
        table.add_column(name)
    for name in ("WEIGHTS", "KV USED", "KV CACHED", "KV HELD", "KV LIMIT", "RUNNING", "WAITING", "IDLE"):
        table.add_column(name, justify="right")
    for entry in answer["models"]:
        table.add_row(entry["model"], entry["worker"], *_cells(entry["report"]))
    return table


def _cells(report: dict[str, Any] | None) -> list[str]:
    if report is None:
        return ["worker is away"]
    limit = report["kv_limit_bytes"]
    state = report["state"] + (" (pinned)" if report["pinned"] else "")
    if report["state"] == "loading":
        state += f" {report['load_progress']:.0%}"
    if report["error"]:
        state += f": {report['error']}"
    return [
        state,
        _mib(report["weights_bytes"]),
        _mib(report["kv_used_bytes"]),
        _mib(report["kv_cached_bytes"]),
        _mib(report["kv_slab_bytes"]),
        "-" if limit is None else _mib(limit),
        str(report["num_running"]),
        str(report["num_waiting"]),
        f"{report['idle_seconds']:.0f} s" if report["state"] == "active" else "-",
    ]


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}M" if size < 10 * MIB else f"{size / MIB:.0f}M"
