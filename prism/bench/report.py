"""One HTML file with everything in it: figures, tables, plots."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from prism.bench import metrics, plots
from prism.bench.replay import Run

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .2rem .6rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr:nth-child(even) { background: #f5f5f5 }
img { width: 100% } h2 { margin-top: 2rem; font-size: 1.1rem }
"""
HEAD = ("completed", "num_requests", "request_throughput", "request_goodput", "output_throughput")
CONDITIONS = (
    "date",
    "model_id",
    "dataset_name",
    "dataset_path",
    "time_scale",
    "rate_scale",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "seed",
    "slo_scale",
    "send_slo",
    "duration",
    "p99_lateness_ms",
)


def write_report(run: Run, result: Mapping[str, Any], path: Path) -> None:
    """Write the report of a run."""
    path.write_text(make_report(run, result), encoding="utf-8")


def make_report(run: Run, result: Mapping[str, Any]) -> str:
    """The report's text."""
    models = metrics.by_model(run.records)
    has_objectives = any(value is not None for value in result["attainment"].values())
    parts = [
        "<h1>prism bench</h1>",
        _table(("", ""), [(name, result[name]) for name in CONDITIONS if result[name] is not None]),
        "<h2>Models</h2>",
        _models(result),
        "<h2>Endings</h2>",
        _table(("how", "requests"), _endings(result["endings"])),
    ]
    images = [
        ("Time to first token", plots.latency_cdf(models, "TTFT", lambda record: record.ttft)),
        ("Time per output token", plots.latency_cdf(models, "TPOT", lambda record: record.tpot)),
        ("Over time", plots.timeline(run.records, run.duration)),
        ("Each model over time: red is late or did not finish", plots.activity(models)),
    ]
    if has_objectives:
        images.insert(2, ("Attainment", plots.attainment_bars(result["models"])))
    parts += [_image(title, image) for title, image in images]
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>prism bench {result["date"]}</title>'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


def _models(result: Mapping[str, Any]) -> str:
    latencies = [name for name in result if name.endswith("_ms") and "lateness" not in name]
    shown = [name for name in latencies if not name.startswith(("mean_", "std_"))]
    header = ("model", *HEAD, *shown, "slo ttft/tpot ms", "ttft met", "tpot met", "both")
    rows = []
    for key, entry in (*result["models"].items(), ("all", result)):
        slo = entry.get("slo")
        objectives = "" if slo is None else f"{_text(slo['ttft_ms'])} / {_text(slo['tpot_ms'])}"
        met = [
            "-" if share is None else f"{100 * share:.1f}%"
            for share in (entry["attainment"][name] for name in ("ttft", "tpot", "both"))
        ]
        rows.append((key, *(entry[name] for name in (*HEAD, *shown)), objectives, *met))
    return _table(header, rows)


def _endings(endings: Mapping[str, Any]) -> list[tuple[str, int]]:
    rows = [("finished", endings["finished"])]
    rows += [(f"refused with status {status}", count) for status, count in endings["refused"].items()]
    rows += [(f"failed: {reason}", count) for reason, count in endings["broken"].items()]
    return [*rows, ("timed out", endings["timed_out"])]


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>"] if any(header) else []
    lines += ["<tr>" + "".join(f"<td>{escape(_text(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _image(title: str, image: bytes) -> str:
    source = "data:image/svg+xml;base64," + b64encode(image).decode()
    return f'<h2>{escape(title)}</h2>\n<img alt="{escape(title)}" src="{source}">'
