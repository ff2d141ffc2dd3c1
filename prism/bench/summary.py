"""Prints results as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from prism.bench.baseline import Baseline

LATE_MS = 20.0
"""Lateness of the client's that is told."""


def print_result(result: dict[str, Any]) -> None:
    """The whole, then each model."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for name, value in _lines(result):
        console.print(f"{name:<34}{value}")
    print_whole(console, models_table(result))
    for line in _warnings(result):
        console.print(line)


def _lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    endings = result["endings"]
    refused, broken = (sum(endings[name].values()) for name in ("refused", "broken"))
    lines = [
        ("Requests", f"{result['num_requests']} in {result['duration']:.2f} s"),
        (
            "Ended",
            f"{result['completed']} finished, {refused} refused, {broken} failed, "
            f"{endings['timed_out']} timed out",
        ),
        ("Tokens in, out", f"{result['total_input_tokens']}, {result['total_output_tokens']}"),
        ("Request throughput (req/s)", f"{result['request_throughput']:.2f}"),
        ("Output token throughput (tok/s)", f"{result['output_throughput']:.2f}"),
    ]
    if result["request_goodput"] is not None:
        lines.append(("Request goodput (req/s)", f"{result['request_goodput']:.2f}"))
    lines.append(("Client's lateness, p99 (ms)", f"{result['p99_lateness_ms']:.2f}"))
    return lines


def models_table(result: dict[str, Any]) -> Table:
    """One row a model, and one for all."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    percentiles = [name for name in result if name.startswith("p") and name.endswith("_ms")]
    columns = [n for n in result if n.startswith("median_") and n.endswith("_ms")] + [
        name for name in percentiles if "lateness" not in name
    ]
    table.add_column("MODEL", no_wrap=True)
    for name in ("DONE", "OF", *columns, "TTFT MET", "TPOT MET", "BOTH"):
        table.add_column(name.removesuffix("_ms").replace("_", " ").upper(), justify="right")
    for name, entry in (*result["models"].items(), ("all", result)):
        met = [_percent(entry["attainment"][key]) for key in ("ttft", "tpot", "both")]
        numbers = [f"{entry[column]:.1f}" for column in columns]
        table.add_row(name, str(entry["completed"]), str(entry["num_requests"]), *numbers, *met)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _warnings(result: dict[str, Any]) -> list[str]:
    lines = []
    if result["p99_lateness_ms"] > LATE_MS and result["max_concurrency"] is None:
        lines.append("the client was late: latencies of this run include its own")
    if result["num_other_prompt_length"]:
        lines.append(f"{result['num_other_prompt_length']} prompts were not of the planned length")
    if result["num_short_outputs"]:
        lines.append(f"{result['num_short_outputs']} answers were shorter than planned")
    for kind in ("refused", "broken"):
        lines += [f"{count} times: {reason}" for reason, count in result["endings"][kind].items()]
    return lines


def print_baseline(baseline: Baseline, scale: float) -> None:
    """What was measured, and the objectives that follow."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("MODEL", no_wrap=True)
    for name in ("REQUESTS", "P95 TTFT", "P95 TPOT", f"TTFT x {scale:g}", f"TPOT x {scale:g}"):
        table.add_column(name, justify="right")
    for name, model in baseline.models.items():
        row = [model.ttft, model.tpot, scale * model.ttft, model.tpot and scale * model.tpot]
        cells = ["-" if value is None else f"{1000 * value:.1f} ms" for value in row]
        table.add_row(name, str(model.num_requests), *cells)
    print_whole(console, table)


def print_whole(console: Console, table: Table) -> None:
    """As wide as it must be: a narrow terminal wraps lines, but no number is cut."""
    wanted = Measurement.get(console, console.options.update(width=1000), table).maximum
    console.width = max(console.width, wanted)
    console.print(table)
