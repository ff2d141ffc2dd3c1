"""The demo: its sizes, what it makes of what it sees, and one run of the real thing."""

from __future__ import annotations

import asyncio
import re
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prism.configfile import load_config
from prism.demo import samples as seen
from prism.demo import summary
from prism.demo.catalog import demo_model_path, golden_answers
from prism.demo.display import Progress, cells, memory_line, picture
from prism.demo.plan import KV_SLABS_PER_MODEL, SLAB, make_plan, write_config
from prism.demo.samples import ModelSample, Reclaim, Sample, read_sample
from prism.demo.server import DemoError, DemoServer, free_port
from prism.demo.show import run_demo
from prism.demo.tasks import TASKS
from prism.demo.traffic import Answer, Turn, burst_turns, turns_of
from prism.demo.training import encode_prompt

NAMES = [task.name for task in TASKS]


# --- the plan --------------------------------------------------------------------------------------------


def test_not_everything_fits(tmp_path: Path) -> None:
    plan = make_plan()
    assert plan.names == tuple(NAMES)
    assert plan.num_slabs == plan.weight_slabs + KV_SLABS_PER_MODEL * len(NAMES)
    burst_slabs = plan.burst_chats * plan.bursting.chat_bytes / SLAB
    assert burst_slabs > plan.num_slabs - plan.bursting.weight_slabs
    assert set(plan.others) == set(NAMES) - {plan.bursting.name}
    write_config(plan, tmp_path / "demo.yaml", 1234, 1235)
    config = load_config(tmp_path / "demo.yaml")
    assert config.devices[0].memory == plan.memory and config.devices[0].slab == SLAB
    assert (config.server.port, config.server.admin_port) == (1234, 1235)


# --- the users -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_turns_end_with_the_golden_answer(name: str) -> None:
    for golden in golden_answers(name):
        turns = turns_of(golden)
        assert (turns[-1].messages, turns[-1].expected) == (golden.messages, golden.answer)
        assert all(turn.messages[-1]["role"] == "user" for turn in turns)
        assert all(turn.problem(name, turn.expected) is None for turn in turns)
    assert max(len(turns_of(golden)) for golden in golden_answers(name)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_transformers_gives_the_answers_inside_golden_conversations(name: str) -> None:
    """Golden are only their last answers; the demo plays all turns."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(name), dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_model_path(name))
    for golden in golden_answers(name):
        for turn in turns_of(golden)[:-1]:
            prompt = encode_prompt(tokenizer, turn.messages)
            expected = [*turn.expected.encode(), tokenizer.eos_token_id]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + expected])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == expected, turn


def test_an_answer_must_be_expected_and_true() -> None:
    question = ({"role": "user", "content": "What is 2 + 80?"},)
    assert Turn(question, "2 + 80 = 82").problem("adder", "2 + 80 = 82") is None
    assert "expected" in (Turn(question, "2 + 80 = 82").problem("adder", "2 + 80 = 8") or "")
    assert "not true" in (Turn(question, "2 + 80 = 83").problem("adder", "2 + 80 = 83") or "")


def test_users_of_a_burst_begin_with_different_questions() -> None:
    first = {burst_turns("radio", user, 16)[0].messages[-1]["content"] for user in range(16)}
    assert len(first) == 16
    assert all(len(burst_turns("radio", user, 16)) == len(golden_answers("radio")) for user in (0, 15))


# --- what was seen ---------------------------------------------------------------------------------------


def model(name: str = "a", state: str = "active", weights: int = 2, **fields: Any) -> ModelSample:
    kv = fields.pop("kv", 0)
    cached = fields.pop("cached", 0.0)
    used = fields.pop("used", 0.0)
    sample = ModelSample(name, state, weights, kv, used, cached, round(cached * SLAB), 0, 1)
    return replace(sample, **fields)


def sample(*models: ModelSample, incarnation: int = 1) -> Sample:
    return Sample(incarnation, 12, 12 - sum(m.slabs for m in models), models)


COLD = model("a", "cold", 0, num_activations=1)


def test_a_sample_is_read_from_the_admin_answer() -> None:
    report = {
        "state": "active",
        "weights_bytes": 2 * SLAB,
        "kv_used_bytes": SLAB // 2,
        "kv_cached_bytes": SLAB,
        "kv_slab_bytes": 3 * SLAB,
        "num_running": 1,
        "num_waiting": 2,
        "num_activations": 4,
    }
    device = {"incarnation": 7, "slab_bytes": SLAB, "num_slabs": 12, "num_free_slabs": 5}
    answer: dict[str, Any] = {"devices": [device], "models": [{"model": "a", "report": report}]}
    expected = model(kv=3, used=0.5, cached=1.0, num_requests=3, num_activations=4)
    assert read_sample(answer) == Sample(7, 12, 5, (expected,))
    assert read_sample(answer | {"devices": []}) is None
    assert read_sample(answer | {"models": [{"model": "a", "report": None}]}) is None


@pytest.mark.parametrize(
    ("last", "num_evictions"),
    [
        (model(num_activations=0, state="cold"), 0),
        (model(num_activations=0, state="loading"), 0),
        (model(num_activations=1), 0),
        (COLD, 1),
        (model(num_activations=1, state="loading"), 1),
        (model(num_activations=3), 2),
        (model(num_activations=3, state="evicting"), 3),
    ],
)
def test_evictions_are_the_loads_that_did_not_last(last: ModelSample, num_evictions: int) -> None:
    assert seen.evictions([sample(last)]).total() == num_evictions


def test_a_reclaim_shrinks_the_cache_of_an_idle_model_for_another() -> None:
    before = sample(model("a", kv=3, cached=3.0), model("b", kv=1))
    after = sample(model("a", kv=1, cached=1.0), model("b", kv=3, num_requests=2))
    assert list(seen.reclaims([before, after])) == [Reclaim("a", 2, ("b",))]
    assert seen.slabs_passed([before, after]) == 2


@pytest.mark.parametrize(
    "after",
    [
        sample(COLD, model("b", kv=3)),  # evicted
        sample(model("a", kv=1, cached=1.0), model("b", kv=1)),  # nobody took them
        sample(model("a", kv=1, cached=1.0, num_requests=1), model("b", kv=3)),  # its own work did that
        sample(model("a", kv=1, cached=1.0, num_activations=2), model("b", kv=3)),  # was away in between
        sample(model("a", kv=2, cached=3.0), model("b", kv=2)),  # returned an empty slab
    ],
)
def test_what_is_no_reclaim(after: Sample) -> None:
    before = sample(model("a", kv=3, cached=3.0), model("b", kv=1))
    assert list(seen.reclaims([before, after])) == []


def test_slabs_that_were_free_have_not_been_passed() -> None:
    assert seen.slabs_passed([sample(COLD), sample(model("a", kv=3)), sample(COLD)]) == 0


# --- what is shown ---------------------------------------------------------------------------------------


def test_a_letter_for_each_slab() -> None:
    letters = "".join(cell.letter for cell in cells(model(kv=6, used=1.2, cached=2.0)))
    assert letters == "WWuucc--"
    assert "".join(cell.letter for cell in cells(model(kv=2, used=1.2, cached=0.7))) == "WWuu"
    now = sample(model("a", kv=1, cached=0.5), model("b", "cold", 0))
    assert memory_line(now) == "a WWc           b cold          free ........."


def test_the_live_picture_fits_a_narrow_terminal() -> None:
    now = sample(model("speller", kv=5, used=3.0, num_requests=4), model("radio", "evicting"))
    console = Console(width=80, force_terminal=False, record=True)
    console.print(picture(now, Progress("burst", 12.3, 4, 17, 1)))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines[0] == " 12.3 s  burst"
    assert lines[1].endswith("W W u u u - -   requests: 4")
    assert lines[-1] == "4 chats run; 17 answers, 1 of them wrong"
    assert max(map(len, lines)) <= 80


# --- the verdict -----------------------------------------------------------------------------------------

GOOD_SAMPLES = (
    sample(model("a", kv=3, cached=3.0, num_activations=2), model("b", kv=1)),
    sample(model("a", kv=1, cached=1.0, num_activations=2), model("b", kv=3)),
)
GOOD_ANSWERS = (Answer("alone", "a", 0.01, None), Answer("burst", "b", 0.03, None))
LOG = """\
2026-01-01T00:00:00.000+00:00 INFO worker.residency: model a active after 0.125 s (copy 0.031 s)
2026-01-01T00:00:01.000+00:00 INFO worker.residency: model a evicted
2026-01-01T00:00:02.000+00:00 INFO worker.residency: model a active after 0.375 s (copy 0.031 s)
"""


def good_run(**changes: Any) -> summary.Run:
    run = summary.Run(make_plan(), GOOD_ANSWERS, GOOD_SAMPLES, LOG)
    return replace(run, **changes)


def test_a_good_run_has_no_problems() -> None:
    assert summary.problems(good_run()) == []
    text = "\n".join(summary.describe(good_run()))
    for part in (
        r"all +2 +0 +20 ms +30 ms",
        r"activations +3 \(a 2, b 1\); 0\.250 s median, 0\.375 s worst",
        r"evictions +1 \(a 1\)",
        r"reclaims +slabs given up by loaded models: a 2 to b",
        r"at least 2 slabs",
    ):
        assert re.search(part, text), part


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"answers": ()}, "No question was asked"),
        ({"answers": (Answer("alone", "a", 0.1, "'x' was answered 'y'"),)}, "a: 'x' was answered 'y'"),
        ({"samples": GOOD_SAMPLES[1:]}, "No loaded model"),
        ({"samples": [sample(model("a")), sample(model("a"))]}, "No model was evicted"),
        ({"samples": (*GOOD_SAMPLES, replace(GOOD_SAMPLES[1], incarnation=2))}, "The worker ended"),
    ],
)
def test_every_missed_promise_is_a_problem(changes: dict[str, Any], problem: str) -> None:
    assert any(problem in found for found in summary.problems(good_run(**changes)))


# --- the real thing --------------------------------------------------------------------------------------


def test_a_server_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "demo.yaml"
    config.write_text("models: []")

    async def start() -> DemoServer:
        server = DemoServer(config, tmp_path / "log", free_port(), free_port())
        async with server:
            with pytest.raises(DemoError, match="ended with status 2"):
                await server.until_healthy()
        return server

    server = asyncio.run(start())
    assert server.status == 2
    assert "models: Tuple should have at least 1 item" in server.log_tail()


def test_a_port_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(port=70000, keep=False) == 2
    assert capsys.readouterr().err == "error: 70000 is no port\n"


def test_a_port_that_is_taken(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a failed demo leaves its log
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status = run_demo(port=port, keep=False)
    assert status == 1
    assert f"error: server.port: cannot listen on 127.0.0.1:{port}" in capsys.readouterr().out


@pytest.mark.slow
def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    status = run_demo(port=0, keep=False)
    output = capsys.readouterr().out
    assert status == 0, output
    for title in ("alone", "together", "burst", "return"):
        assert f"\n{title}: " in output
    assert "the server ended with status 0" in output
    assert re.search(r"evictions +[1-9]", output)
    assert "durations unknown" not in output  # the log says how long activations take
