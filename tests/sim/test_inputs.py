"""Traces, shapes, objectives and placements."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from prism.config import Config
from prism.errors import ConfigError
from prism.modes import Mode
from prism.sim.cluster import Cluster
from prism.sim.generate import Synthetic, generate
from prism.sim.inputs import SHIPPED, Inputs, make_cluster, open_profile, read_workload
from prism.sim.modes import Limits, limits_of
from prism.sim.placing import Room, by_controller, by_load, demands, fixed_shares
from prism.sim.shapes import ARCHITECTURES, PUBLISHED_MIX, published_mix
from prism.sim.trace import TraceRow, compress, read_trace, write_trace
from prism.sim.workload import percentile, read_models, workload
from prism.types import MiB, ModelId

KEYS = [ModelId(f"k{i:02d}") for i in range(58)]
SLAB = 32 * MiB


def rows(count: int = 60, models: int = 6) -> list[TraceRow]:
    return [TraceRow(i * 0.5, KEYS[i % models], 100 + i, 20) for i in range(count)]


def test_the_published_mix_is_kept() -> None:
    mix = published_mix(KEYS)
    sizes = [sum(mix[key] in names for key in KEYS) for _, names in PUBLISHED_MIX]
    assert sizes == [43, 8, 3, 4]
    fewer = Counter(published_mix(KEYS[:32]).values())
    assert sum(fewer.values()) == 32 and fewer["llama-3-8b"] == 4 and fewer["qwen2.5-32b"] == 2
    popular = list(published_mix(KEYS[:32]).values())[:8]
    assert {"llama-3-8b"} < set(popular)  # sizes and popularity have nothing to do with each other


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_can_be_read(name: str) -> None:
    """8B at batch 64 and 1,088 tokens each, and a prompt of 4,000, as measured (benchmarks/engine)."""
    profile = open_profile(name)
    for shape in ARCHITECTURES.values():
        assert profile.costs(shape.name, shape.shape).steps.decode(1, 1000) > 0
    costs = profile.costs("llama-3-8b")
    seconds = costs.steps.decode(64, 64 * 1088)
    assert seconds == pytest.approx({"h200": 7.08e-3, "h100": 9.55e-3}[name], rel=0.04)
    assert costs.steps.prefill(4000) == pytest.approx(100e-3, rel=0.1)


def test_trace_written_and_read(tmp_path: Path) -> None:
    write_trace(rows(), tmp_path / "t.csv")
    assert read_trace(tmp_path / "t.csv") == rows()
    assert compress(rows(), 2.0)[3].arrival == 0.75


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("arrival_s,model_key\n1,a\n", "no column prompt_tokens, output_tokens"),
        ("arrival_s,model_key,prompt_tokens,output_tokens\n1,a,x,2\n", "line 2"),
        ("arrival_s,model_key,prompt_tokens,output_tokens\n-1,a,1,2\n", "line 2"),
        ("arrival_s,model_key,prompt_tokens,output_tokens\n", "no requests"),
    ],
)
def test_bad_traces_are_named(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_trace(tmp_path / "t.csv")


def test_made_traces() -> None:
    """The same for a seed, at the rate that was asked for, popularity falling, bursts where wanted."""
    calm = Synthetic(models=5, rate=20, duration=400)
    made = generate(calm, 3)
    assert made == generate(calm, 3) != generate(calm, 4)
    assert len(made) == pytest.approx(8000, rel=0.1)
    counts = Counter(row.model for row in made)
    assert [model for model, _ in counts.most_common()] == sorted(counts)
    assert max(row.prompt for row in made) <= calm.longest
    resting = generate(Synthetic(models=1, rate=5, duration=2000, on=20, off=60), 1)
    gaps = [b.arrival - a.arrival for a, b in pairwise(resting)]
    assert len(resting) == pytest.approx(10000, rel=0.3) and sum(gap > 10 for gap in gaps) > 5


def test_models_may_have_the_shape_of_one_in_the_profile(tmp_path: Path) -> None:
    shipped = open_profile("h200")
    mine = msgspec.structs.replace(shipped, models={"mine": shipped.models["llama-3-8b"]})
    path = tmp_path / "models.json"
    path.write_text(json.dumps({key: {"shape": "mine", "context": 4096} for key in KEYS}))
    load = workload(rows(), mine, 5.0, read_models(path, mine))
    assert load.served[KEYS[0]].costs == shipped.models["llama-3-8b"].costs()
    path.write_text(json.dumps({KEYS[0]: {"shape": "mine"}, KEYS[1]: {"shape": "theirs"}}))
    with pytest.raises(ConfigError) as caught:
        read_models(path, mine)
    unknown, no_context = caught.value.problems
    assert "shape theirs is not known" in unknown and f"{KEYS[0]}.context is missing" in no_context


def test_objectives_and_clipping() -> None:
    profile = open_profile("h200")
    long = [*rows(), TraceRow(100.0, KEYS[0], 10**6, 50), TraceRow(101.0, KEYS[0], 10, 10**7)]
    load = workload(long, profile, 5.0, None)
    for index in load.clipped:
        row = load.requests[index]
        assert row.prompt + row.output == load.served[row.model].context
    assert load.clipped == {60, 61} and load.requests[60].output == 50
    twice = workload(long, profile, 10.0, None)
    one, other = load.served[KEYS[1]], twice.served[KEYS[1]]
    assert other.slo.ttft == pytest.approx(2 * one.slo.ttft)
    alone = percentile([one.costs.steps.prefill(r.prompt) for r in long if r.model == KEYS[1]], 0.95)
    assert one.slo.ttft == pytest.approx(5 * alone)
    with pytest.raises(ConfigError, match="k00 of the trace"):
        workload(long, profile, 5.0, {})


def test_limits_are_those_of_the_server(tmp_path: Path) -> None:
    """Defaults are the configuration's own, and a configuration file changes them."""
    (tmp_path / "config.json").write_text("{}")
    minimal = {"models": [{"name": "a", "path": str(tmp_path)}]}
    defaults = Config.model_validate(minimal | {"devices": [{"kind": "cuda"}]})
    assert limits_of(defaults, is_stepping=False) == Limits()
    path = tmp_path / "prism.yaml"
    given = {
        "devices": [{"memory": "1GiB", "slab": "2MiB", "lanes": 4, "max_batch_size": 8}],
        "limits": {"max_wait": "3s"},
        "scheduling": {"idle_threshold": "45s", "migration_cooldown": "7s"},
    }
    path.write_text(json.dumps(minimal | given))
    inputs = Inputs(None, Synthetic(models=2, duration=9.0), None, "h100", path, None, None, 1.0, 5.0, 1)
    profile = open_profile("h100")
    setup = make_cluster(inputs, read_workload(inputs, profile), profile, Mode.PRISM).setup
    limits = setup.limits
    assert (limits.slab_bytes, limits.num_lanes, limits.max_batch_size) == (2 * MiB, 1, 8)
    assert (limits.max_wait, limits.idle_threshold) == (3.0, 45.0)
    assert not limits.is_queueing, "steps of a CPU have run when they are launched"
    assert setup.order == ("a",)
    assert setup.memory_bytes == 1024 * MiB and setup.scheduling.migration_cooldown == 7.0
    more = replace(inputs, lanes=3, memory=64 * MiB)
    setup = make_cluster(more, read_workload(more, profile), profile, Mode.PRISM).setup
    assert setup.limits.num_lanes == 3 and setup.memory_bytes == 64 * MiB


def test_percentile() -> None:
    assert [percentile(range(1, 101), share) for share in (0.5, 0.95, 1.0)] == [50, 95, 100]
    assert percentile([7.0], 0.5) == 7.0


def test_placements_hold_what_they_are_given() -> None:
    load = workload(
        [TraceRow(i * 0.1, key, 200, 100) for i, key in enumerate(KEYS)], open_profile("h100"), 5.0, None
    )
    demand = demands(load.requests, load.served)
    slabs = 70 * 1024 * MiB // SLAB
    resident = Room(load.served, slabs, SLAB, Mode.ELASTIC)
    placed = by_load(demand, 4, resident)
    assert all(resident.holds(models) for models in placed.devices) and placed.unplaced
    assert sorted([*placed.home(), *placed.unplaced]) == KEYS
    shares = fixed_shares(placed.devices[0], load.served, demand, slabs, SLAB)
    weights = sum(-(-load.served[m].costs.shape.weight_bytes // SLAB) for m in placed.devices[0])
    assert sum(shares.values()) + weights <= slabs and min(shares.values()) >= 16
    moving = Room(load.served, slabs, SLAB, Mode.PRISM)
    assert not by_load(demand, 4, moving).unplaced
    assert sorted(by_controller(load.served, demand, 4, moving, slabs * SLAB, SLAB).home()) == KEYS


def test_residents_are_bound_to_lanes_in_the_order_of_the_configuration() -> None:
    """As in the server, where it decides who is slowed down by whom."""
    profile = open_profile("h100")
    inputs = Inputs(None, Synthetic(models=4, duration=9.0), None, "h100", None, None, None, 1.0, 5.0, 1)
    cluster = make_cluster(inputs, read_workload(inputs, profile), profile, Mode.ELASTIC)
    names = sorted(cluster.load.served)
    ordered = Cluster(cluster.load, replace(cluster.setup, order=tuple(reversed(names))), cluster.demand)
    device = ordered._device(names)
    assert [device.models[name].lane for name in reversed(names)] == [0, 1, 0, 1]
    assert [cluster._device(names).models[name].lane for name in names] == [0, 1, 0, 1]
