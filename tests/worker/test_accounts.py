"""Tenants in a whole worker: what they are charged, and who starts before whom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prism.metrics import Metrics
from prism.worker.gauges import Gauges
from prism.worker.reports import make_report
from tests.support.checkpoints import make_model, save
from tests.support.local_worker import LocalWorker
from tests.worker.test_gauges import value

KEYS = [{"key": "k1", "tenant": "flood"}, {"key": "k2", "tenant": "light", "weight": 3}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("llama"), tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def local(path: Path) -> Iterator[LocalWorker]:
    sections = {"server": {"api_keys": KEYS}, "limits": {"max_queue": 40}}
    local = LocalWorker({"m": path}, 8, sections=sections, max_batch_tokens=64, max_batch_size=4)
    yield local
    local.close()


def flood(local: LocalWorker, count: int, max_tokens: int = 8) -> None:
    for number in range(count):
        local.submit(f"f{number}", "m", [number % 50 + 1] * 40, max_tokens, tenant="flood")


def test_the_requests_of_a_flood_wait_for_those_of_others(local: LocalWorker) -> None:
    flood(local, 40)
    local.run(until=lambda: len(local.outbox.started) > 8)
    for number in range(5):
        num_started = len(local.outbox.started)
        local.submit(f"l{number}", "m", [60 + number] * 40, 8, tenant="light", weight=3.0)
        local.run(until=lambda number=number: f"l{number}" in local.outbox.started)  # type: ignore[misc]
        assert len(local.outbox.started) - num_started <= 4, "those that the engine had, and one"
    local.run()
    assert len(local.outbox.finished) == 45


def test_a_request_is_told_its_place_among_tenants(local: LocalWorker) -> None:
    """Shares were no part of it: who was within its own was told that a flood came first."""
    flood(local, 30)
    local.run(until=lambda: len(local.outbox.started) > 8)
    local.submit("l", "m", [60] * 40, 8, tenant="light", weight=3.0)
    local.submit("more", "m", [61] * 40, 8, tenant="flood")
    local.run()
    first, last = local.outbox.started["l"], local.outbox.started["more"]
    assert first.queue_position == 1 and last.queue_position > 10
    assert first.estimated_seconds < last.estimated_seconds


def test_with_the_device_to_itself_a_tenant_is_served_as_if_there_were_no_others(local: LocalWorker) -> None:
    flood(local, 20)
    local.run()
    places = {name: place for place, name in enumerate(local.outbox.started)}
    assert all(abs(places[f"f{number}"] - number) < 4 for number in range(20)), "in their order, by steps"


def test_what_tenants_use_is_reported(local: LocalWorker) -> None:
    local.submit("f", "m", [5] * 40, 8, tenant="flood")
    local.submit("l", "m", [6] * 20, 4, tenant="light", weight=3.0, n=2)
    local.run(until=lambda: len(local.outbox.started) == 2)
    waiting, light = make_report(local.worker, local.now).tenants
    assert (waiting.tenant, waiting.weight, light.tenant, light.weight) == ("flood", 1, "light", 3)
    assert waiting.num_running == light.num_running == 1
    local.run()
    used, light = make_report(local.worker, local.now).tenants
    assert (used.num_running, used.num_waiting) == (0, 0)
    assert (used.prompt_tokens, used.decoded_tokens) == (40, 8)
    assert light.decoded_tokens == 8 and 20 <= light.prompt_tokens <= 40, "choices share their prompt"
    assert used.device_seconds > 0 and light.device_seconds > 0


def test_metrics_have_configured_tenants_alone(local: LocalWorker) -> None:
    metrics = Metrics()
    gauges = Gauges(metrics, "worker-0")
    for name in ("first", "second"):
        local.submit(name, "m", [5] * 40, 3, tenant="flood")
        local.submit(f"{name}-stranger", "m", [5] * 40, 3, tenant="stranger")
        local.run()
        gauges.update(local.worker)
    text = metrics.text().decode()
    assert value(text, 'prism:tenant_generation_tokens_total{tenant="flood"}') == 6
    assert value(text, 'prism:tenant_generation_tokens_total{tenant="light"}') == 0
    assert value(text, 'prism:tenant_device_seconds_total{tenant="flood"}') > 0
    assert value(text, 'prism:tenant_requests_waiting{tenant="flood"}') == 0
    assert "stranger" not in text


def test_a_queue_full_of_one_tenant_s_requests_takes_others(local: LocalWorker) -> None:
    """Each refusal was one of all: a flood kept everybody else out."""
    flood(local, 45)
    assert sorted(local.outbox.rejected) == [f"f{number}" for number in range(40, 45)]
    for number in range(31):
        local.submit(f"l{number}", "m", [5] * 10, 2, tenant="light", weight=3.0)
    local.submit("nobody's", "m", [5] * 10, 2)
    assert sorted(local.outbox.rejected)[5:] == ["l30", "nobody's"], "three quarters of it are light's"
    local.run()
    assert len(local.outbox.finished) == 70
