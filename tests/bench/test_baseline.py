"""A model alone, and the objectives that follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prism.bench.baseline import (
    Baseline,
    ModelBaseline,
    measure,
    quantile_requests,
    read_baseline,
    with_objectives,
    write_baseline,
)
from prism.bench.targets import Objectives
from prism.bench.wire import Style
from prism.bench.workload import Planned
from prism.errors import ConfigError
from tests.bench.fake_server import FakeServer, Kind
from tests.bench.records import target
from tests.bench.test_replay import target as target_at

BASELINE = Baseline({"a": ModelBaseline(0.1, 0.01, 20), "b": ModelBaseline(0.2, None, 20)}, "today")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_requests_are_quantiles_of_the_traces_own() -> None:
    planned = [Planned(i, float(i), target(), 1 + (i * 37) % 100, i) for i in range(100)]
    (chosen,) = quantile_requests(planned, 10).values()
    assert [request.prompt for request in chosen] == [6, 16, 26, 36, 46, 56, 66, 76, 86, 96]
    assert all(planned[request.output].prompt == request.prompt for request in chosen)
    assert len(next(iter(quantile_requests(planned[:3], 10).values()))) == 10


@pytest.mark.anyio
async def test_each_model_is_measured_alone() -> None:
    async with FakeServer() as server:
        at = target_at(server.url)
        both = [replace(at, key=key) for key in ("a", "b")]
        chosen = {to: [Planned(i, 0.0, to, 5, 3) for i in range(4)] for to in both}
        found = await measure(chosen, Style(), timeout=10, seed=0)
        assert [len(body["prompt"]) for body in server.bodies] == [5] * 10  # one before each model's
        assert server.num_connections == 2  # never two at a time
    assert list(found) == ["a", "b"]
    assert found["a"].num_requests == 4
    assert 0 < found["a"].ttft < 5


@pytest.mark.anyio
async def test_a_baseline_with_failures_is_none() -> None:
    async with FakeServer() as server:
        at = target_at(server.url)
        style = Style(token_ids=(Kind.REFUSE, Kind.REFUSE + 1))
        with pytest.raises(ConfigError, match=r"model m: 2 of 2 failed: .*429"):
            await measure({at: [Planned(i, 0.0, at, 5, 3) for i in range(2)]}, style, timeout=10, seed=0)


def test_objectives_are_the_baseline_times_the_scale() -> None:
    targets = {
        "a": target("a"),
        "b": target("b", Objectives(tpot=0.5)),
        "c": target("c", Objectives(ttft=1.0)),
    }
    found = with_objectives(targets, BASELINE, 4.0)
    assert found["a"].objectives == pytest.approx(Objectives(0.4, 0.04))
    assert found["b"].objectives == Objectives(0.8, 0.5)
    assert found["c"].objectives == Objectives(1.0)
    with pytest.raises(ConfigError, match="model d is not in the baseline"):
        with_objectives({"d": target("d")}, BASELINE, 4.0)


def test_written_and_read_back(tmp_path: Path) -> None:
    write_baseline(BASELINE, tmp_path / "b.json")
    assert read_baseline(tmp_path / "b.json") == BASELINE


@pytest.mark.parametrize("text", ['{"models": {"a": {"ttft": 0}}}', '{"models": {}, "version": 2}', "["])
def test_files_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(ConfigError, match=r"b\.json"):
        read_baseline(tmp_path / "b.json")
