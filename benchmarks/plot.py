"""Plots of the results that are committed in a benchmark's folder.

Usage: python benchmarks/plot.py [engine] [activation] ...    writes FOLDER/plot.png; all without a name
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

HERE = Path(__file__).parent
H200 = "one NVIDIA H200"
SHAPES = {"8b": "Llama-3-8B shape", "1b": "Llama-3.2-1B shape"}
BLUE, GREY, ORANGE, GREEN = "#2b6cb0", "#a0aec0", "#dd6b20", "#2f855a"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
HEIGHT = 3.0


def read(folder: str, name: str) -> Any:
    return json.loads((HERE / folder / name).read_text(encoding="utf-8"))


def figure(title: str, widths: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Axes side by side, each as wide as is said, in inches."""
    made = Figure(figsize=(sum(widths), HEIGHT), dpi=110, layout="constrained")
    made.suptitle(title, fontsize=11)
    return made, list(made.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])


def bars(
    axis: Axes, names: Sequence[str], series: Mapping[str, tuple[Sequence[float], str]], digits: str
) -> None:
    """Bars that lie, with their numbers behind them; `series` has values and a colour for each label."""
    height = 0.8 / len(series)
    for index, (label, (values, color)) in enumerate(series.items()):
        places = [place + (index - (len(series) - 1) / 2) * height for place in range(len(names))]
        drawn = axis.barh(places, values, 0.92 * height, label=label, color=color)
        texts = [f"{value + 1e-9:{digits}}" for value in values]  # halves are rounded up, as in the tables
        axis.bar_label(drawn, texts, padding=2, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.18)


def legend(made: Figure, axis: Axes) -> None:
    """One for all axes, below them."""
    made.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )


def engine() -> Figure:
    beside = read("engine", "results-h200-beside-vllm.json")
    decodes = read("engine", "results-h200-decode.json")
    made, (floor, offline, together) = figure(f"The engine on {H200}, bf16", (3.6, 3.6, 4.2))
    for shape, color in (("8b", BLUE), ("1b", ORANGE)):
        steps = decodes[f"decode_{shape}"]
        floor.plot(
            [s["batch"] for s in steps], [s["x_floor"] for s in steps], "o-", color=color, label=SHAPES[shape]
        )
    floor.axhline(1.0, color=GREY, linestyle="--")
    floor.set_xscale("log", base=2)
    floor.xaxis.set_major_formatter("{x:g}")
    floor.set(
        title="decode step over its floor (reading\nweights and KV), 1,088 tokens of context",
        xlabel="batch",
        ylim=(0.9, None),
    )
    floor.set_ylabel("step / floor")
    floor.legend(fontsize=8, frameon=False)
    runs = {"Prism": ("prism", BLUE), "Prism, steps as vLLM's": ("prism_steps_as_vllm", GREEN)}
    rates = {
        label: ([median(run["output_tok_s"] for run in beside[key][f"offline_{s}"]) for s in SHAPES], color)
        for label, (key, color) in runs.items()
    }
    rates["vLLM 0.26"] = ([beside["vllm"][shape]["offline_output_tok_s"] for shape in SHAPES], GREY)
    before = [read("engine", f"results-h200-vllm-0.26-{shape}.json") for shape in SHAPES]
    rates["vLLM 0.26, other machine"] = ([run["offline_output_tok_s"] for run in before], ORANGE)
    bars(offline, ["8B", "1B"], rates, ",.0f")
    offline.set(title="1,000 requests, 512 in, 256 out,\noffline, without a server", xlabel="output tokens/s")
    offline.legend(fontsize=8, frameon=False)
    offline.xaxis.set_major_locator(MaxNLocator(4))
    offline.xaxis.set_major_formatter("{x:,.0f}")
    _side_by_side(together)
    return made


def _side_by_side(axis: Axes) -> None:
    pairs = [read("engine", f"results-h200-pairs-{name}.json") for name in ("2-8b", "4-1b")]
    series = {
        "a process each": ([pair["processes"][0]["tok_s"] for pair in pairs], GREY),
        "one process, a lane each": ([pair["together"][0]["tok_s"] for pair in pairs], BLUE),
    }
    bars(axis, ["2 x 8B", "4 x 1B"], series, ",.0f")
    axis.set(title="models side by side,\nbatch 4 each", xlabel="output tokens/s, all together")
    axis.legend(fontsize=8, frameon=False)
    axis.xaxis.set_major_formatter("{x:,.0f}")


def activation() -> Figure:
    results = read("activation", "results-h200.json")
    made, (client, phases) = figure(f"Activations through the whole server, {H200}, bf16", (5.6, 4.6))
    cases = {
        "8B while another 8B leaves": "8b_while_another_8b_leaves_s",
        "1B, unloaded before": "1b_evicted_s",
        "1B while another 1B leaves,\nor still there": "1b_while_another_1b_leaves_s",
        "each of four 1B at once": "four_1b_at_once_s",
        "8B while loaded": "8b_loaded_s",
        "1B while loaded": "1b_loaded_s",
    }
    for place, key in enumerate(cases.values()):
        found = results[key]
        client.plot([found["least"], found["worst"]], [place, place], color=GREY, linewidth=5, zorder=1)
        client.plot(found["median"], place, "o", color=BLUE, zorder=2)
        client.annotate(
            f"{found['median']:.3f}", (found["worst"], place), (5, -3), textcoords="offset points"
        )
    client.set_yticks(range(len(cases)), cases)
    client.invert_yaxis()
    client.margins(x=0.12, y=0.12)
    client.set(
        title="request to first token, prompt of 512:\nmedian, least and worst",
        xlabel="seconds",
        xlim=(0, None),
    )
    _phases(phases, results["log"])
    return made


def _phases(axis: Axes, log: Sequence[str]) -> None:
    """Of each load that the worker's log tells, in order; the first ever has unregistered memory."""
    pattern = re.compile(r"model (\S+) active after ([0-9.]+) s \(copy ([0-9.]+) s\)")
    loads = [match.groups() for line in log if (match := pattern.search(line))][1:]
    copies, totals = ([float(load[i]) for load in loads] for i in (2, 1))
    places = range(len(loads))
    axis.bar(places, copies, color=BLUE, label="copy over the link, verified")
    axis.bar(
        places,
        [t - c for t, c in zip(totals, copies, strict=True)],
        bottom=copies,
        color=ORANGE,
        label="the rest",
    )
    axis.set_xticks(places, [name[:2] for name, _, _ in loads], fontsize=8)
    axis.set(title="each load, in order;\nthe last four were asked for at once", ylabel="seconds")
    axis.legend(fontsize=8, frameon=False, loc="upper right")


def handover() -> Figure:
    made, (loop, gaps) = figure(f"10 GiB of KV pass to another model, {H200}", (3.8, 5.6))
    found = read("handover", "results-h200.json")
    ways = {
        "in steps of 32 slabs": found["in_steps"],
        "the same, to a model that decodes": found["to_busy_in_steps"],
        "all at once": found["at_once"],
    }
    colors = dict(zip(ways, (BLUE, ORANGE, GREY), strict=True))
    kinds = ("median", "worst")
    times = {
        label: ([way["handover_ms"][kind] for kind in kinds], colors[label]) for label, way in ways.items()
    }
    bars(loop, kinds, times, ".2f")
    loop.set(title="time of the loop", xlabel="milliseconds")
    around = {}
    for label, way in ways.items():
        before = way.get("neighbour_worst_gap_before_ms", found["neighbour_gap_ms"])
        gaps_of = (before, way["neighbour_worst_gap_around_ms"])
        around[label] = ([gap[kind] for gap in gaps_of for kind in kinds], colors[label])
    bars(
        gaps,
        ["before, median", "before, worst", "largest around one,\nmedian", "largest around one,\nworst"],
        around,
        ".2f",
    )
    gaps.set(title="gap between two tokens of a 1B that decodes", xlabel="milliseconds")
    legend(made, loop)
    return made


def elastic() -> Figure:
    results = read("elastic", "results-h200.json")
    made, (axis,) = figure(f"Two 1B shapes in turns of 64 requests, 1,000 in, 128 out, {H200}", (7.5,))
    for mode, color, label in (
        ("fixed", GREY, "fixed: each has its own KV"),
        ("elastic", BLUE, "elastic: one share of that size, which changes its owner"),
    ):
        for number, run in enumerate(results[mode]):
            turns = range(1, len(run["tok_s"]) + 1)
            style = ("o-", "s--", "^:")[number % 3]
            axis.plot(
                turns, run["tok_s"], style, color=color, label=f"{label}, run {number + 1}", markersize=4
            )
    axis.set(xlabel="turn", ylabel="output tokens/s of the turn", ylim=(0, None))
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return made


def sharing() -> Figure:
    results = read("sharing", "results-h200.json")["modes"]
    runs = [mode["measured"] for mode in results.values()]
    took = " or ".join(map(str, sorted({round(run["duration"]) for run in runs})))
    requests = f"{runs[0]['num_prompts']} requests, by mode in {took} s"
    title = f"Eight models of 1B and 8B share 30 GiB of {H200}, {requests}"
    made, axes = figure(title, (2.9, 2.9, 2.9, 2.9))
    for axis, mode in zip(axes, ("prism", "elastic", "static", "timeshare"), strict=True):
        compared = results[mode]["compared"]
        rows = [compared[name] for name in ("ttft_attainment", "tpot_attainment", "attainment")]
        series = {
            "measured": ([row["measured"] for row in rows], BLUE),
            "predicted by prism simulate": ([row["predicted"] for row in rows], GREY),
        }
        bars(axis, ["TTFT", "TPOT", "both"], series, ".2f")
        axis.set(title=f"mode {mode}", xlabel="share of requests in time", xlim=(0, 1.2))
    legend(made, axes[0])
    return made


def fp8() -> Figure:
    results = read("fp8", "results-h200.json")
    made, axes = figure(f"fp8 weights beside bf16, {H200}, random weights", (2.9, 2.9, 2.9, 2.9))
    cases: tuple[tuple[str, str, Callable[[str, str], float]], ...] = (
        ("weights", "GB", lambda shape, name: results[f"activation_{shape}"][name]["weights_gb"]),
        ("activation", "seconds", lambda shape, name: results[f"activation_{shape}"][name]["activation_s"]),
        ("decode step, one row", "milliseconds", lambda *of: _fp8_steps(results, *of)["decode_1"]["step_ms"]),
        ("prompt of 4,000", "milliseconds", lambda *of: _fp8_steps(results, *of)["prompt_4000"]["ttft_ms"]),
    )
    for axis, (title, unit, value) in zip(axes, cases, strict=True):
        series = {
            label: ([value(shape, name) for shape in SHAPES], color)
            for label, name, color in (("bf16", "none", GREY), ("fp8", "fp8", BLUE))
        }
        bars(axis, ["8B", "1B"], series, ".3g")
        axis.set(title=title, xlabel=unit)
    legend(made, axes[0])
    return made


def _fp8_steps(results: Any, shape: str, name: str) -> Any:
    return results[f"steps_{shape}"][name]


def serving() -> Figure:
    alone = read("engine", "results-h200-slow-host.json")
    made, (large, small) = figure(f"1,000 requests, 512 in, 256 out, all at once, {H200}", (4.2, 4.2))
    now = {
        shape: {run["gateways"]: run for run in read("serving", f"results-h200-{shape}.json")}
        for shape in SHAPES
    }
    before = {
        shape: {run["gateways"]: run for run in read("serving", f"results-h200-before-{shape}.json")}
        for shape in SHAPES
    }
    for axis, shape in ((large, "8b"), (small, "1b")):
        rows = {"engine alone, another machine": alone[f"offline_{shape}"][0]["output_tok_s"]}
        rows |= {
            f"server, {n} gateways": run["offline"]["output_tok_s"] for n, run in sorted(now[shape].items())
        }
        rows |= {
            f"before, {n} gateways, another machine": run["offline"]["output_tok_s"]
            for n, run in sorted(before[shape].items())
        }
        names = [name.replace("1 gateways", "1 gateway") for name in rows]
        bars(axis, names, {"": (list(rows.values()), BLUE)}, ",.0f")
        axis.set(title=SHAPES[shape], xlabel="output tokens/s", xlim=(0, 1.25 * max(rows.values())))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_major_locator(MaxNLocator(3))
    return made


def kv_host() -> Figure:
    results = read("kv-host", "results-h200.json")
    turn, neighbour = results["turn"], results["neighbour"]
    made, (first, gaps) = figure(f"KV in host memory, 8B shape, {H200}", (4.6, 5.0))
    bars(
        first,
        ["KV fetched", "KV computed again"],
        {"": ([turn["ttft_fetch_ms"], turn["ttft_compute_ms"]], BLUE)},
        ".1f",
    )
    first.set(
        title="first token of a conversation's next turn,\n4,000 tokens before it", xlabel="milliseconds"
    )
    names = ["usual", "worst, nothing leaves", "worst of an eviction,\nmedian", "worst of all evictions"]
    keys = ("gap_ms", "worst_gap_alone_ms", "median_of_worst_ms", "worst_gap_around_evictions_ms")
    bars(gaps, names, {"": ([neighbour[key] for key in keys], ORANGE)}, ".2f")
    gaps.set(
        title="gap between tokens of a 1B on the same lane\nwhile 1 GiB of KV leaves", xlabel="milliseconds"
    )
    return made


def capture() -> Figure:
    results = read("capture", "results-h200.json")
    unprepared = read("capture", "results-h200-unprepared.json")
    made, (axis,) = figure(f"What a 1B that decodes notices of an 8B beside it, {H200}", (8.5,))
    cases = {
        "nothing else": results["alone"],
        "kernels and memory taken ahead": results["kernels_ahead"]["neighbour_gap_ms"],
        "graphs captured": results["captured_in_slices"]["neighbour_gap_ms"],
        "for the first time": results["captured_first"]["neighbour_gap_ms"],
        "with nothing taken ahead": unprepared["captured_first"]["neighbour_gap_ms"],
        "graphs captured at once": results["captured_at_once"]["neighbour_gap_ms"],
        "steps launched in slices": results["launched_in_slices"]["neighbour_gap_ms"],
        "steps launched at once": results["launched_at_once"]["neighbour_gap_ms"],
    }
    names = {"median": BLUE, "p99": ORANGE, "worst": GREY}
    series = {
        {"p99": "99 %"}.get(name, name): ([case[name] for case in cases.values()], color)
        for name, color in names.items()
    }
    bars(axis, list(cases), series, ".2f")
    axis.set_xlabel("gap between two tokens, milliseconds")
    axis.legend(fontsize=8, frameon=False)
    return made


PLOTS: dict[str, Callable[[], Figure]] = {
    "engine": engine,
    "activation": activation,
    "handover": handover,
    "serving": serving,
    "elastic": elastic,
    "sharing": sharing,
    "fp8": fp8,
    "kv-host": kv_host,
    "capture": capture,
}


def draw(name: str, path: Path) -> None:
    with rc_context(STYLE):
        PLOTS[name]().savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help=", ".join(PLOTS))
    folders = parser.parse_args().folders or list(PLOTS)
    if unknown := sorted(set(folders) - set(PLOTS)):
        parser.error(f"no plot for {', '.join(unknown)}; there are {', '.join(PLOTS)}")
    for name in folders:
        draw(name, HERE / name / "plot.png")


if __name__ == "__main__":
    main()
