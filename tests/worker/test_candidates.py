"""What models offer to a turn is kept between two steps, and is what a fresh look would tell."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from prism.messages import Activate, Evict, SetLimits
from prism.types import MiB, Slo
from prism.worker.candidates import Candidate, Candidates
from prism.worker.lanes import Lane
from prism.worker.snapshot import Runnable
from prism.worker.turns import Turn
from tests.support.checkpoints import make_model, prompts, save
from tests.support.late import LateBackend
from tests.support.local_worker import LocalWorker

NAMES = ("a", "b", "c", "d", "e", "f")


def candidates_of(local: LocalWorker) -> Candidates:
    worker = local.worker
    lanes, batch = worker.device.lanes, worker.max_batch_tokens
    return Candidates(lanes, worker.models, worker.requests, worker.costs, worker.rules, batch)


@pytest.mark.parametrize("mode", ["prism", "elastic"])
@pytest.mark.parametrize("seed", range(2))
def test_a_turn_is_chosen_as_if_nothing_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, mode: str
) -> None:
    """Requests of all kinds come and end, memory is short, models come and go."""
    rng = random.Random(seed)
    shape = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2}
    path = save(make_model("llama", seed=0, max_position_embeddings=1024, **shape), tmp_path / "llama")
    num_slabs = 14 if mode == "prism" else 18
    local = LocalWorker(
        dict.fromkeys(NAMES, path),
        num_slabs,
        backend=LateBackend(),
        host_kv=4 * MiB,
        scheduling={"mode": mode},
        max_batch_size=12,
        max_batch_tokens=512,
    )
    choose, made, num_made = Candidates.turn, Candidate._make, 0
    chosen: list[tuple[int, int]] = []
    """Of each choice among several, how many there were, and how many of them were made anew."""

    def counted(candidate: Candidate) -> Runnable:
        nonlocal num_made
        num_made += 1
        return made(candidate)

    def watched(kept: Candidates, lane: Lane, now: float) -> Turn | None:
        before, able = num_made, [each for each in kept.of(lane) if each.can_step(now)]
        turn = choose(kept, lane, now)
        if len(able) > 1:
            chosen.append((len(able), num_made - before))
        kept.check()
        assert choose(candidates_of(local), lane, now) == turn
        return turn

    monkeypatch.setattr(Candidate, "_make", counted)
    monkeypatch.setattr(Candidates, "turn", watched)
    for number in range(300):
        if len(local.worker.requests) < 40 and rng.random() < 0.7:
            submit_any(local, rng, f"r{number}")
        if rng.random() < 0.15:
            disturb(local, rng, mode)
        for _ in range(rng.randint(1, 4)):
            local.pump()
    num_able, num_anew = (sum(each) for each in zip(*chosen, strict=True))
    assert len(chosen) > 80 and num_anew < 0.6 * num_able
    engines = [model.engine for model in local.worker.models.values() if model.engine is not None]
    assert sum(engine.scheduler.num_preemptions for engine in engines)
    for name in NAMES:
        local.worker.on_command(limits(name))
    local.run()
    local.close()


def submit_any(local: LocalWorker, rng: random.Random, request_id: str) -> None:
    length = rng.choice([3, 20, 90, 500])
    extra: dict[str, object] = {"slo": Slo(rng.choice([0.01, 2.0]), rng.choice([0.001, 0.01, 0.2]))}
    if rng.random() < 0.2:
        extra["n"] = 3
    if rng.random() < 0.2:
        extra["presence_penalty"] = 0.5
    if rng.random() < 0.02:
        extra["alone"] = True
    prompt = prompts(1, length, seed=rng.randrange(6))[0]
    local.submit(request_id, rng.choice(NAMES), prompt, rng.randint(1, 80), **extra)


def disturb(local: LocalWorker, rng: random.Random, mode: str) -> None:
    """Something that changes what models could step."""
    model = local.worker.models[rng.choice(NAMES)]
    running = list(local.worker.requests)
    match rng.randrange(6):
        case 0:
            local.worker.on_command(Activate(epoch=1, command_id=1, model=model.name))
        case 1 if mode == "prism":
            local.worker.on_command(Evict(epoch=1, command_id=1, model=model.name, returns=True))
        case 2:
            local.worker.on_command(limits(model.name, rng.choice([None, 2])))
        case 3 if model.engine is not None and model.is_settled:
            model.engine.scheduler.preempt_youngest(1)
        case _ if running:
            local.cancel(rng.choice(running).request_id, rng.choice([None, 0, 1]))


def limits(name: str, slabs: int | None = None) -> SetLimits:
    limit = None if slabs is None else slabs * 2 * MiB
    return SetLimits(epoch=1, command_id=1, model=name, kv_floor_bytes=0, kv_limit_bytes=limit)


def _runnable(local: LocalWorker) -> Runnable:
    kept, (lane,) = local.worker._stepper._candidates, local.worker.device.lanes
    (model,) = kept.snapshot(lane, [each for each in kept.of(lane) if each.can_step(local.now)]).runnable
    return model


def test_a_turn_sees_when_prompts_are_due_and_how_quick_streams_must_be(tmp_path: Path) -> None:
    """Where a lane has too many streams they are put off, and not the prompts beside them."""
    path = save(make_model("llama", seed=0), tmp_path / "llama")
    local = LocalWorker({"llama": path}, num_slabs=6, host_kv=0, max_batch_tokens=64)
    local.submit("first", "llama", [1, 2, 3], max_tokens=20)
    local.run(until=lambda: len(local.outbox.tokens.get(("first", 0), ())) > 2)
    stream = _runnable(local)
    (ticket,) = local.worker.requests
    assert (stream.num_decodes, stream.tpot) == (1, ticket.submit.slo.tpot)
    assert stream.streams is not None and stream.streams.share > 0 and stream.prompt_deadline == float("inf")
    local.submit("second", "llama", [1 + i % 50 for i in range(200)], max_tokens=20)
    local.run(until=lambda: all(ticket.is_running for ticket in local.worker.requests))
    both = _runnable(local)
    assert both.prompt_tokens and both.prompt_deadline == list(local.worker.requests)[1].due
    assert both.decode_deadline != both.prompt_deadline
    local.run()
    local.close()


def test_a_turn_looks_at_no_request_that_waits(tmp_path: Path) -> None:
    """Every step asks for one: it took 1 ms where 10,000 requests waited."""
    path = save(make_model("llama", seed=0), tmp_path / "llama")
    local = LocalWorker({"llama": path}, num_slabs=6, host_kv=0, max_batch_size=2)
    for number in range(20):
        local.submit(f"r{number}", "llama", [1, 2, 3], max_tokens=20)
    local.run(until=lambda: len(local.outbox.started) == 2)
    for ticket in local.worker.requests.waiting:
        ticket.due = None  # type: ignore[assignment]  # whoever looks at it fails
    assert local.worker.requests.num_waiting == 18 and _runnable(local).num_decodes == 2


def test_who_may_get_no_longer_has_no_turn(tmp_path: Path) -> None:
    path = save(make_model("llama", seed=0), tmp_path / "llama")
    local = LocalWorker({"llama": path}, num_slabs=6, host_kv=0, backend=LateBackend())
    local.submit("r", "llama", [1, 2, 3], max_tokens=50)
    engine = None
    while engine is None or not any(s.num_pending and s.num_output for s in engine.scheduler.running):
        local.pump()
        engine = local.worker.models["llama"].engine
    kept, lane = local.worker._stepper._candidates, local.device.lanes[0]
    assert kept.turn(lane, local.now) is not None
    (sequence,) = engine.scheduler.running
    engine.limit_context(sequence.num_total)
    assert kept.turn(lane, local.now) is None, "the token on its way is the last one"
    local.run()
    local.close()
