"""What a run says: attainment of the objectives, goodput, and what it took."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prism.sim.cluster import Setup
from prism.sim.controlling import Done, Kind
from prism.sim.jobs import End, Served
from prism.sim.placing import Placement
from prism.sim.results import DeviceResult, ModelCounts, Outcome
from prism.sim.ticks import to_seconds
from prism.sim.workload import Workload, percentile
from prism.types import ModelId


def is_ttft_met(outcome: Outcome, served: Served) -> bool:
    """Its first token came in time. What was refused did not."""
    return outcome.end is End.SERVED and outcome.ttft is not None and outcome.ttft <= served.slo.ttft


def is_tpot_met(outcome: Outcome, served: Served) -> bool:
    """Its tokens came in time on average; a single token is in time."""
    return outcome.end is End.SERVED and (outcome.tpot is None or outcome.tpot <= served.slo.tpot)


def report(
    load: Workload,
    placement: Placement,
    setup: Setup,
    results: Sequence[DeviceResult],
    done: Sequence[Done] = (),
    warm_up: float = 0.0,
) -> dict[str, Any]:
    """All of it as JSON values. `done` is what a controller has moved.

    What came in the first `warm_up` seconds is left out, but for counts of what happened to models.
    """
    outcomes = [o for result in results for o in result.outcomes if o.arrival >= warm_up]
    by_model: dict[ModelId, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_model[outcome.model].append(outcome)
    ends = [to_seconds(1), *(outcome.ended for outcome in outcomes)]  # all may end where they begin
    span = max(ends)
    reported = max(ends[0], span - warm_up)
    counts = _counts(results)
    devices = len(placement.devices)
    homes = placement.home()
    models = {
        model: {
            **_figures(by_model[model], load.served, reported),
            "shape": served.shape,
            "slo_ttft_s": served.slo.ttft,
            "slo_tpot_s": served.slo.tpot,
            "device": homes.get(model),
            **asdict(counts.get(model, ModelCounts(0, 0, 0, 0))),
        }
        for model, served in sorted(load.served.items())
    }
    return {
        **_figures(outcomes, load.served, reported),
        "mode": setup.mode.value,
        "devices": devices,
        "device_hours": devices * span / 3600,
        "busy_share": sum(r.busy for r in results) / (span * devices * setup.limits.num_lanes),
        "activations": sum(c.activations for c in counts.values()),
        "ahead": sum(c.ahead for c in counts.values()),
        **{kind.value: sum(each.kind is kind for each in done) for kind in Kind},
        "evictions": sum(c.evictions for c in counts.values()),
        "preemptions": sum(c.preemptions for c in counts.values()),
        "span_s": span,
        "profile": setup.profile.device.name,
        "memory_bytes": setup.memory_bytes,
        "lanes": setup.limits.num_lanes,
        "placement": [list(models) for models in placement.devices],
        "unplaced": list(placement.unplaced),
        "models": models,
    }


def _counts(results: Iterable[DeviceResult]) -> dict[ModelId, ModelCounts]:
    """Of each model, on all devices."""
    counts: dict[ModelId, ModelCounts] = {}
    for result in results:
        for model, more in result.counts.items():
            one = counts.get(model, ModelCounts(0, 0, 0, 0))
            counts[model] = ModelCounts(
                one.activations + more.activations,
                one.ahead + more.ahead,
                one.evictions + more.evictions,
                one.preemptions + more.preemptions,
            )
    return counts


def _figures(outcomes: Sequence[Outcome], served: Mapping[ModelId, Served], span: float) -> dict[str, Any]:
    total = max(1, len(outcomes))
    ttft = [is_ttft_met(o, served[o.model]) for o in outcomes]
    tpot = [is_tpot_met(o, served[o.model]) for o in outcomes]
    both = sum(a and b for a, b in zip(ttft, tpot, strict=True))
    ends = Counter(o.end for o in outcomes)
    return {
        "ttft_attainment": sum(ttft) / total,
        "tpot_attainment": sum(tpot) / total,
        "attainment": both / total,
        "goodput": both / span,
        "requests": len(outcomes),
        **{end.value: ends[end] for end in End},
        "clipped": sum(o.is_clipped for o in outcomes),
        "ttft_s": _percentiles([o.ttft for o in outcomes if o.ttft is not None]),
        "tpot_s": _percentiles([o.tpot for o in outcomes if o.tpot is not None]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{round(100 * share)}": percentile(values, share) for share in (0.5, 0.9, 0.95, 0.99)}
