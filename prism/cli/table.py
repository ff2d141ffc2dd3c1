"""Prints models and devices as tables."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from prism.types import GiB, MiB

_TEXTS = ("MODEL", "WORKER", "STATE")
_NUMBERS = ("WEIGHTS", "KV USED", "CACHED", "HELD", "HOST", "LIMIT", "RUN", "WAIT", "ETA", "IDLE")


_COLUMNS = 1000


def print_models(answer: dict[str, Any], *, as_json: bool) -> None:
    """`prism ps`."""
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for device in answer["devices"]:
        total = device["num_slabs"] * device["slab_bytes"]
        free = device["num_free_slabs"] * device["slab_bytes"]
        console.print(
            f"{device['worker']} on {device['device']}: {_size(total)} in slabs of "
            f"{_size(device['slab_bytes'])}, {_size(free)} free{_host_memory(device)}"
            f"{'; has not reported for some time' if device['is_silent'] else ''}"
        )
    print_whole(console, models_table(answer))
    for entry in answer["models"]:
        if entry["report"] is not None and entry["report"]["error"]:
            console.print(f"{entry['model']}: {entry['report']['error']}")
    for name in answer["placement"]["crowded"]:
        console.print(f"{name}: takes turns in memory, since all that is asked for fits no device together")
    for name in answer["placement"]["shut_out"]:
        console.print(f"{name}: has no room beside pinned models")
    for name in answer["placement"]["infeasible"]:
        console.print(f"{name}: fits no device")
    if answer["tenants"]:
        print_whole(console, tenants_table(answer))


def print_whole(console: Console, table: Table) -> None:
    """As wide as it must be: a narrow terminal wraps a line, but no name and no number is cut."""
    wide = console.options.update(width=_COLUMNS)
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


def _host_memory(device: dict[str, Any]) -> str:
    """Host memory from which the device loads at full speed and where KV waits; what went wrong with it."""
    size, error = device["registered_bytes"], device["registration_error"]
    text = f", {_size(size)} of host memory registered" if size else ""
    text = text if error is None else f"{text}; not all could be registered: {error}"
    size, error = device["kv_host_bytes"], device["kv_host_error"]
    text += f", {_size(size)} of host memory for KV" if size else ""
    return text if error is None else f"{text}; no more could be taken for KV: {error}"


def models_table(answer: dict[str, Any]) -> Table:
    """One row a model. The worker is shown when there are several, though all models may live on one."""
    workers = {place["worker"] for entry in answer["models"] for place in _places(entry)}
    several = len(workers | {device["worker"] for device in answer["devices"]}) > 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in _TEXTS:
        if several or name != "WORKER":
            table.add_column(name, no_wrap=True)
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    for entry in answer["models"]:
        for place in _places(entry):
            worker = [place["worker"]] if several else []
            table.add_row(entry["model"], *worker, *_cells(place["report"], _part(entry, place["worker"])))
    return table


def tenants_table(answer: dict[str, Any]) -> Table:
    """One row a tenant: what it has of all devices."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("TENANT", no_wrap=True)
    for name in ("WEIGHT", "RUN", "WAIT", "PROMPT TOKENS", "OUTPUT TOKENS", "DEVICE"):
        table.add_column(name, justify="right", no_wrap=True)
    for tenant in answer["tenants"]:
        table.add_row(
            tenant["tenant"],
            f"{tenant['weight']:g}",
            *(
                str(tenant[name])
                for name in ("num_running", "num_waiting", "prompt_tokens", "decoded_tokens")
            ),
            f"{tenant['device_seconds']:.1f}s",
        )
    return table


def _places(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Where a model is: its home first."""
    return [entry, *entry["elsewhere"]]


def _part(entry: dict[str, Any], worker: str) -> str | None:
    """What a device is in a migration under way."""
    migration = entry["migration"]
    if migration is None:
        return None
    if worker == migration["source"]:
        return f"moving to {migration['target']}" if migration["target"] else "leaving"
    return "arriving" if worker == migration["target"] else None


def _cells(report: dict[str, Any] | None, part: str | None) -> list[str]:
    if report is None:
        return ["away"]
    limit = report["kv_limit_bytes"]
    return [
        _state(report) if part is None else f"{_state(report)}, {part}",
        _size(report["weights_bytes"]),
        _size(report["kv_used_bytes"]),
        _size(report["kv_cached_bytes"]),
        _size(report["kv_slab_bytes"]),
        _size(report["kv_host_bytes"]),
        "-" if limit is None else _size(limit),
        str(report["num_running"]),
        str(report["num_waiting"]),
        f"{report['estimated_wait']:.1f}s" if report["num_waiting"] else "-",
        f"{report['idle_seconds']:.0f}s" if report["state"] == "active" else "-",
    ]


def _state(report: dict[str, Any]) -> str:
    state = str(report["state"])
    if state == "loading":
        state += f" {report['load_progress']:.0%}"
    return f"{state}, pinned" if report["pinned"] else state


def _size(size: int) -> str:
    if size == 0:
        return "0"
    number, unit = (size / GiB, "G") if size >= 10 * GiB else (size / MiB, "M")
    return f"{number:.1f}".removesuffix(".0") + unit if number < 100 else f"{number:.0f}{unit}"
