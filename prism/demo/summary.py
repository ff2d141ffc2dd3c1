"""What the demo saw, and whether that is what it promises. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from prism.demo import samples as seen
from prism.demo.plan import SLAB, Plan
from prism.demo.samples import Reclaim, Sample
from prism.demo.traffic import Answer
from prism.types import MiB

_ACTIVE = re.compile(r"model (\S+) active after ([0-9.]+) s")


@dataclass(frozen=True)
class Run:
    """Everything that came back."""

    plan: Plan
    answers: Sequence[Answer]
    samples: Sequence[Sample]
    """At least one."""
    log: str
    """The server's, which tells how long activations took: no other place keeps each of them."""


def problems(run: Run) -> list[str]:
    """What the demo promises and did not see, one sentence each."""
    found = [f"{answer.model}: {answer.problem}" for answer in run.answers if answer.problem is not None]
    if not run.answers:
        found.append("No question was asked.")
    if not seen.evictions(run.samples).total():
        found.append("No model was evicted.")
    if not list(seen.reclaims(run.samples)):
        found.append("No loaded model was seen giving cached KV to another one.")
    if seen.restarts(run.samples):
        found.append("The worker ended and was started again.")
    return found


def describe(run: Run) -> list[str]:
    """The summary, line by line."""
    return [*_answers(run.answers), "", *_memory(run)]


def _answers(answers: Sequence[Answer]) -> list[str]:
    phases = list(dict.fromkeys(answer.phase for answer in answers))
    rows = [(phase, [answer for answer in answers if answer.phase == phase]) for phase in phases]
    rows.append(("all", list(answers)))
    width = max(len(phase) for phase, _ in rows)
    lines = [f"{'':<{width}}  requests  wrong  first token: median   worst"]
    for phase, group in rows:
        times = [answer.ttft * 1000 for answer in group] or [0.0]
        wrong = sum(answer.problem is not None for answer in group)
        lines.append(
            f"{phase:<{width}}  {len(group):8}  {wrong:5}  {median(times):16.0f} ms  {max(times):5.0f} ms"
        )
    return lines


def _memory(run: Run) -> list[str]:
    plan, samples = run.plan, run.samples
    return [
        f"memory       {plan.memory // MiB} MiB in {plan.num_slabs} slabs of {SLAB // MiB} MiB; "
        f"the weights of all models take {plan.weight_slabs}",
        f"activations  {_counts(seen.activations(samples))}; {_durations(run.log)}",
        f"evictions    {_counts(seen.evictions(samples))}",
        f"reclaims     {_reclaims(seen.reclaims(samples))}",
        f"moved        at least {seen.slabs_passed(samples)} slabs went from one model to another",
    ]


def _counts(counts: Counter[str]) -> str:
    each = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    return f"{counts.total()} ({each})" if each else "0"


def activation_seconds(log: str) -> list[float]:
    """How long each activation took, from the worker's log."""
    return [float(seconds) for _, seconds in _ACTIVE.findall(log)]


def _durations(log: str) -> str:
    times = activation_seconds(log)
    return f"{median(times):.3f} s median, {max(times):.3f} s worst" if times else "durations unknown"


def _reclaims(found: Iterable[Reclaim]) -> str:
    given: dict[str, int] = {}
    takers: dict[str, set[str]] = {}
    for reclaim in found:
        given[reclaim.model] = given.get(reclaim.model, 0) + reclaim.slabs
        takers.setdefault(reclaim.model, set()).update(reclaim.takers)
    parts = [f"{name} {count} to {' and '.join(sorted(takers[name]))}" for name, count in given.items()]
    return f"slabs given up by loaded models: {'; '.join(parts)}" if parts else "none seen"
