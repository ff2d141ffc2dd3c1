"""Graphs that are captured between other steps, and first steps behind a copy, on a GPU: the same tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism.engine.gpu.graphs import Graphs, Key
from prism.messages import Evict
from prism.types import Bytes, ModelState
from prism.worker import early, loop, stepper
from tests.support.checkpoints import make_model, prompts, save
from tests.support.local_worker import InlineLink, LocalWorker

pytestmark = pytest.mark.gpu

NUM_LAYERS = 3
SHAPE = {
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
A, B = "llama", "qwen2"
PROMPT = (prompts(1, 300, seed=5)[0] * 300)[:300]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for seed, family in enumerate((A, B)):
        model = make_model(family, seed=seed, max_position_embeddings=4096, head_dim=64, **SHAPE)
        made[family] = save(model.bfloat16(), folder / family)
    return made


def captures(local: LocalWorker) -> Any:
    return local.device.backend._captures  # type: ignore[attr-defined]


def stop_behind_each_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer; else layers as small as these are launched and captured several at a time."""
    monkeypatch.setattr(loop, "ASIDE_SECONDS", 0.0)
    monkeypatch.setattr(early, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(stepper, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(stepper, "LONG_SLICE_SECONDS", 0.0)


def serve(local: LocalWorker, rounds: int = 2) -> dict[tuple[str, int], list[int]]:
    """One request after the other of a model, while the other one decodes all the while."""
    for turn in range(rounds):
        local.submit(f"long{turn}", B, PROMPT, max_tokens=150)
        for i in range(3):
            local.submit(f"{turn}.{i}", A, PROMPT[: 100 + i], max_tokens=40)
            local.run(rounds=10**6, until=lambda i=i, t=turn: (f"{t}.{i}", 0) in local.outbox.finished)
        local.run(rounds=10**6)
    return local.outbox.tokens


@pytest.mark.parametrize("stops_at_once", [False, True])
def test_tokens_do_not_depend_on_captures(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, stops_at_once: bool
) -> None:
    """Other steps run while a capture is left alone. Each sequence is stepped alone, so bits are equal."""
    from tests.support.gpu_worker import gpu_worker

    plain = gpu_worker(paths, lanes=2)
    monkeypatch.setattr(plain.device.backend, "work_aside", lambda seconds, urgent_only: False)
    texts = serve(plain)
    assert plain.device.backend.graph_usage.num_graphs == 0
    plain.close()
    if stops_at_once:
        stop_behind_each_half(monkeypatch)
    local = gpu_worker(paths, lanes=2)
    replayed: list[Key] = []
    slices: list[bool] = []
    replay, advance = Graphs.replay, captures(local).advance

    def noted(graphs: Graphs, key: Key, stream: Any) -> bool:
        replayed.append(key)
        return replay(graphs, key, stream)

    def counted(seconds: float, *, urgent_only: bool) -> bool:
        slices.append(advance(seconds, urgent_only=urgent_only))
        return slices[-1]

    monkeypatch.setattr(Graphs, "replay", noted)
    monkeypatch.setattr(captures(local), "advance", counted)
    assert serve(local) == texts
    num_graphs = local.device.backend.graph_usage.num_graphs
    assert num_graphs > 4
    assert {bool(key.prompt_rows) for key in replayed} == {True, False}
    if stops_at_once:
        assert sum(slices) >= 2 * NUM_LAYERS * num_graphs
    local.close()


def test_no_slice_of_a_capture_takes_long(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.gpu_worker import gpu_worker

    local = gpu_worker(paths, lanes=2)
    advance, spans = captures(local).advance, []

    def timed(seconds: float, *, urgent_only: bool) -> bool:
        begin = time.perf_counter()
        result = advance(seconds, urgent_only=urgent_only)
        if result:
            spans.append(time.perf_counter() - begin)
        return bool(result)

    monkeypatch.setattr(captures(local), "advance", timed)
    serve(local)
    spans = sorted(spans[len(spans) // 10 :])
    assert spans[int(0.99 * len(spans))] < 0.003
    local.close()


def test_a_capture_that_fails_is_given_up(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prism.engine.gpu.runner import GpuRunner
    from tests.support.gpu_worker import gpu_worker

    local = gpu_worker(paths, lanes=1)
    is_broken = [True]

    def broken(work: Callable[..., Any]) -> Callable[..., Any]:
        def pieces(*arguments: Any) -> Any:
            import torch

            for need in work(*arguments):
                yield need
                if is_broken and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError("cannot be captured")

        return pieces

    for name in ("_captured_work", "_captured_mixed"):
        monkeypatch.setattr(GpuRunner, name, broken(getattr(GpuRunner, name)))
    with caplog.at_level(logging.CRITICAL, logger="prism.engine.gpu.captures"):
        serve(local, 1)
    assert local.device.backend.graph_usage.num_graphs == 0
    is_broken.clear()
    for graphs in local.device.backend._graphs:  # type: ignore[attr-defined]
        graphs._failed.clear()
    local.outbox.tokens.clear()
    local.outbox.finished.clear()
    lengths = {len(text) for text in serve(local, 1).values()}
    assert lengths == {40, 150}
    assert local.device.backend.graph_usage.num_graphs > 0, "a failed capture spoils those that follow"
    local.close()


def test_a_model_that_goes_takes_its_captures_along(paths: dict[str, Path]) -> None:
    from tests.support.gpu_worker import gpu_worker

    local = gpu_worker(paths, lanes=2)
    local.submit("r", A, PROMPT, max_tokens=4)
    local.run(rounds=10**6, until=lambda: captures(local)._capture is not None)
    for _ in range(3):
        captures(local).advance(0.0, urgent_only=False)
    engine = local.worker.models[A].engine
    assert engine is not None
    local.device.backend.forget(engine.runner)
    assert captures(local)._capture is None and not captures(local)._likely
    local.run(rounds=10**6)
    for model in local.worker.models.values():
        if model.engine is not None:
            local.device.backend.forget(model.engine.runner)
    assert local.device.backend.graph_usage.num_graphs == 0
    serve(local, 1)
    assert local.device.backend.graph_usage.num_graphs > 0, "memory of graphs cannot be used again"
    local.close()


def test_graphs_of_a_model_that_is_away_are_captured(paths: dict[str, Path]) -> None:
    """Its memory is not mapped, and nothing reads it before the model is back."""
    from tests.support.gpu_worker import gpu_worker

    local = gpu_worker(paths, lanes=1)
    local.submit("before", A, PROMPT, max_tokens=8)
    local.run(rounds=10**6, until=lambda: ("before", 0) in local.outbox.finished)
    local.worker.on_command(Evict(epoch=1, command_id=1, model=A))
    local.run(rounds=10**6, until=lambda: local.worker.models[A].state is ModelState.COLD)
    graphs = local.device.backend._graphs[0]  # type: ignore[attr-defined]
    num_before = graphs.usage.num_graphs
    assert captures(local)._likely
    local.run(rounds=10**6)
    assert graphs.usage.num_graphs > num_before and not captures(local)._likely and not graphs._failed
    local.submit("after", A, PROMPT, max_tokens=8)
    local.run(rounds=10**6)
    assert local.outbox.tokens["after", 0] == local.outbox.tokens["before", 0]
    local.close()


def load_slowly(local: LocalWorker, monkeypatch: pytest.MonkeyPatch, between: Callable[[], None]) -> None:
    """Loads whose pieces arrive between rounds of the loop."""
    link = local.link
    assert isinstance(link, InlineLink)
    local.device.backend.copier.chunk_bytes = Bytes(1 << 18)

    def wait(transfer: Any) -> None:
        while not transfer.has_ended.is_set():
            link.traffic.step()
            for _ in range(3):
                local.worker.advance()
            between()

    monkeypatch.setattr(link, "wait", wait)


@pytest.mark.parametrize(
    ("kind", "length", "stops_at_once"),
    [
        ({}, 300, False),
        ({}, 300, True),
        ({"temperature": 0.8, "top_p": 0.9}, 300, False),
        ({"frequency_penalty": 0.4}, 300, False),
        ({}, 1, False),  # a step of decodes alone, all of whose blocks the lane's tables have to learn
    ],
)
def test_a_first_step_behind_the_copy_draws_the_same(
    paths: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: dict[str, Any],
    length: int,
    stops_at_once: bool,
) -> None:
    from tests.support.gpu_worker import gpu_worker

    texts, is_launched = [], []
    for slowly in (False, True):
        if slowly and stops_at_once:
            stop_behind_each_half(monkeypatch)
        local = gpu_worker(paths, lanes=1)
        local.submit("neighbour", B, PROMPT, max_tokens=600)
        local.run(rounds=10**6, until=lambda local=local: ("neighbour", 0) in local.outbox.tokens)

        def watch(local: LocalWorker = local) -> None:
            model = local.worker.models[A]
            if model.early is not None:
                is_launched.append(model.early.is_launched)
                assert model.state is ModelState.LOADING and ("r", 0) not in local.outbox.tokens

        if slowly:
            load_slowly(local, monkeypatch, watch)
        for lane in local.device.backend._lanes:  # type: ignore[attr-defined]
            lane.tables[lane.tables.eq(0).all(1)] = 1 << 20  # what no step has entered is no block
            lane.tables[0] = 0
        local.submit("r", A, PROMPT[:length], max_tokens=30, **kind)
        local.run(rounds=10**6)
        texts.append(local.outbox.tokens)
        local.close()
    assert is_launched and not is_launched[0] and is_launched[-1]
    assert texts[0]["r", 0][:8] == texts[1]["r", 0][:8]
    assert texts[0]["neighbour", 0] == texts[1]["neighbour", 0]
