"""The options that `prism simulate` and `prism plan` share, with their help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

_TRACE = "Trace"
_MADE = "Made trace (without --trace)"

Trace = Annotated[
    Path | None,
    typer.Option(
        help="CSV with arrival_s, model_key, prompt_tokens, output_tokens; without it one is made.",
        rich_help_panel=_TRACE,
    ),
]
Models = Annotated[
    Path | None,
    typer.Option(
        help="JSON: for each key of the trace {shape, ttft?, tpot?, context?}; a shape is a model of the "
        "profile or a known one. By default they come in the published proportion of 43 models of 1-3B, 8 of "
        "4-8B, 3 of 9-30B, 4 larger (32B here).",
        rich_help_panel=_TRACE,
    ),
]
RateScale = Annotated[
    float,
    typer.Option(min=1e-6, help="Requests come so many times as fast.", rich_help_panel=_TRACE),
]
Profile = Annotated[
    str, typer.Option(help="Costs of steps and loads: a file of `prism profile`, h100 or h200 (shipped).")
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="A server's configuration: its limits, its scheduling, what its first device is like and the "
        "order of its models hold, but not the models themselves, mode and profile."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(help="Of a device, for weights and KV: 72GiB, say; by default 92 % of all."),
]
Lanes = Annotated[
    int | None,
    typer.Option(min=1, max=8, help="Steps of so many models at a time on a device; 2 by default."),
]
SloScale = Annotated[
    float,
    typer.Option(min=1e-3, max=1e6, help="Objectives are each model's P95 alone on a device times this."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of a made trace; all else is determined by the inputs.")]
NumModels = Annotated[int, typer.Option(min=1, help="Models.", rich_help_panel=_MADE)]
Rate = Annotated[
    float, typer.Option(min=1e-6, help="Requests a second of all models together.", rich_help_panel=_MADE)
]
Duration = Annotated[float, typer.Option(min=1e-3, help="Seconds.", rich_help_panel=_MADE)]
Alpha = Annotated[
    float,
    typer.Option(
        min=1.01,
        help="Of popularity's power law: model k is asked in proportion to k^(-1/(alpha-1)).",
        rich_help_panel=_MADE,
    ),
]
Cv = Annotated[
    float,
    typer.Option(min=1e-2, help="Of a model's gaps (gamma); 1 is Poisson.", rich_help_panel=_MADE),
]
On = Annotated[
    float, typer.Option(min=0, help="Mean seconds that a model is asked; 0 is always.", rich_help_panel=_MADE)
]
Off = Annotated[float, typer.Option(min=0, help="Mean seconds of rest in between.", rich_help_panel=_MADE)]
Prompt = Annotated[float, typer.Option(min=1, help="Median tokens of a prompt.", rich_help_panel=_MADE)]
Answer = Annotated[float, typer.Option(min=1, help="Median tokens of an output.", rich_help_panel=_MADE)]
Spread = Annotated[
    float, typer.Option(min=0, help="Standard deviation of lengths' logarithms.", rich_help_panel=_MADE)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimOptions:
    """What both are given."""

    trace: Trace = None
    models: Models = None
    rate_scale: RateScale = 1.0
    profile: Profile = "h100"
    config: Config = None
    memory: Memory = None
    lanes: Lanes = None
    slo_scale: SloScale = 5.0
    seed: Seed = 0
    num_models: NumModels = 8
    rate: Rate = 4.0
    duration: Duration = 600.0
    alpha: Alpha = 2.1
    cv: Cv = 1.0
    on: On = 0.0
    off: Off = 0.0
    prompt: Prompt = 300.0
    answer: Answer = 120.0
    spread: Spread = 1.0
