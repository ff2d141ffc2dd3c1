"""Any driver call may fail while requests come in: each of them ends once, and no memory is lost."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from prism.config import Config
from prism.demo.catalog import golden_answers
from prism.demo.training import encode_prompt
from prism.memory.failing import FailingDriver
from prism.memory.host import HostDriver
from prism.types import Bytes
from tests.server.clients import TEXT, Call, ends
from tests.server.harness import DEMO
from tests.server.in_process import InProcess, in_process

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SLAB = 2 * 2**20
NUM_SLABS = 4  # two for the weights of either model, which leaves none for the KV of both
BURSTS = ("adder", "speller", "adder", "speller")
NUM_PROMPTS, NUM_CALLS, NUM_TOKENS = 5, 10, 4


@cache
def shortest(model: str) -> tuple[list[list[int]], list[str]]:
    """Prompts of 50 questions and the beginnings of their answers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO[model])
    goldens = sorted(golden_answers(model), key=lambda golden: golden.num_prompt_tokens)[:50]
    prompts = [encode_prompt(tokenizer, golden.messages) for golden in goldens]
    return prompts, [bytes(golden.token_ids[:NUM_TOKENS]).decode() for golden in goldens]


def burst(model: str) -> list[tuple[Call, list[str]]]:
    """50 requests in 10 calls, every other one a stream, and their answers."""
    prompts, texts = shortest(model)
    body = {"model": model, "max_tokens": NUM_TOKENS, "temperature": 0}
    calls = []
    for number in range(NUM_CALLS):
        mine = slice(number * NUM_PROMPTS, (number + 1) * NUM_PROMPTS)
        call = Call(TEXT, {**body, "prompt": prompts[mine], "stream": number % 2 == 0})
        calls.append((call, texts[mine]))
    return calls


async def ask_all(client: httpx.AsyncClient, prism: InProcess) -> Counter[int | None]:
    """200 requests in bursts, so that the models take turns on the device; how many ended in which way."""
    counts: Counter[int | None] = Counter()
    for model in BURSTS:
        calls = burst(model)
        answers = await ends([call.start(client, prism.url) for call, _ in calls])
        for answer, (_, texts) in zip(answers, calls, strict=True):
            assert not answer.is_broken
            counts[answer.status] += NUM_PROMPTS
            if answer.status == 200:
                assert answer.is_done and answer.error is None
                assert [answer.choices[i].text for i in range(NUM_PROMPTS)] == texts
                assert all(choice.finish == "length" for choice in answer.choices.values())
            else:
                assert answer.status == 503 and answer.error is not None and not answer.choices
                assert "injected" in answer.error["message"]
    assert counts.total() == 200
    return counts


async def test_every_driver_call_fails_once(client: httpx.AsyncClient, tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "models": [{"name": name, "path": str(DEMO[name])} for name in sorted(set(BURSTS))],
            "devices": [{"memory": NUM_SLABS * SLAB, "slab": SLAB}],
        }
    )
    refused = []
    async with in_process(config, tmp_path) as prism:
        for number in range(1, 100):
            driver = FailingDriver(HostDriver(Bytes(NUM_SLABS * SLAB)))
            async with prism.worker(driver):
                before = driver.faults.num_calls
                driver.faults.fail_next(number)
                counts = await ask_all(client, prism)
                num_calls = driver.faults.num_calls - before
                driver.faults.set(None)
            if num_calls < number:
                break
            refused.append(counts[503])
    print(f"{num_calls} driver calls; requests refused when the nth fails: {refused}")
    assert counts[503] == 0, "without a fault nothing is refused"
    assert num_calls == len(refused) >= 15
    assert any(refused) and not all(refused), "some faults are made up for, others are told"
