"""Memory moves between models, and a broken checkpoint takes no other model along."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from prism.demo.catalog import GoldenAnswer, golden_answers
from tests.server.clients import Call, ends, golden_call
from tests.server.harness import DEMO, Server
from tests.server.load import RADIO_END
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SLAB = 2 * 2**20
NUM_SLABS = 14
BROKEN, LACKING = "broken", "lacking"


def weights_of(path: Path) -> Path:
    return path / "model.safetensors"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two copies of the speller: one whose file is cut off, and one without the last of its tensors."""
    folder = tmp_path_factory.mktemp("models")
    paths = {name: Path(shutil.copytree(DEMO["speller"], folder / name)) for name in (BROKEN, LACKING)}
    os.truncate(weights_of(paths[BROKEN]), weights_of(paths[BROKEN]).stat().st_size // 2)
    weights = load_file(weights_of(paths[LACKING]))
    del weights["model.norm.weight"]
    save_file(weights, weights_of(paths[LACKING]))
    return paths


@pytest.fixture(scope="module")
def server(damaged: dict[str, Path]) -> Iterator[Server]:
    with Server(DEMO | damaged, device={"memory": NUM_SLABS * SLAB}) as server:
        yield server


def pool_bytes(server: Server) -> int:
    """Memory that the worker's pool takes of the machine, as the kernel counts it."""
    for descriptor in Path(f"/proc/{server.pid('worker-0')}/fd").iterdir():
        if os.readlink(descriptor).startswith("/memfd:prism-slabs"):
            return descriptor.stat().st_blocks * 512
    raise AssertionError("the worker has no pool")


class Watch:
    """Looks at the models again and again: who had how much, and that nobody had more than there is."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.kv_slabs: dict[str, list[int]] = {name: [] for name in DEMO}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Watch:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        if self._task.done():
            self._task.result()
        self._task.cancel()

    async def _watch(self) -> None:
        while True:
            models = await self._server.models()
            held = sum(each["weights_bytes"] + each["kv_slab_bytes"] for each in models.values())
            assert held <= NUM_SLABS * SLAB
            assert pool_bytes(self._server) == NUM_SLABS * SLAB
            for name, slabs in self.kv_slabs.items():
                slabs.append(models[name]["kv_slab_bytes"] // SLAB)
            await asyncio.sleep(0.1)


def long_stream() -> Call:
    """Some seconds of one greedy answer, none of whose tokens is in doubt (the next best is 0.005 behind)."""
    body = {"temperature": 0, "ignore_eos": True, "max_tokens": 1500, "logit_bias": {RADIO_END: -100}}
    return golden_call("radio", golden_answers("radio")[0], **body)


def burst(model: str, count: int) -> list[tuple[Call, str]]:
    """Different questions, those behind the longest conversations first."""
    longest = sorted(golden_answers(model), key=lambda golden: -golden.num_prompt_tokens)[:count]
    return [(golden_call(model, golden), golden.answer) for golden in longest]


async def ask(calls: list[tuple[Call, str]], client: httpx.AsyncClient, server: Server) -> None:
    """All at once; every answer must be right."""
    answers = await ends([call.start(client, server.url) for call, _ in calls])
    assert [answer.text for answer in answers] == [text for _, text in calls]


async def test_a_burst_takes_memory_while_a_stream_goes_on(client: httpx.AsyncClient, server: Server) -> None:
    alone = await long_stream().start(client, server.url).end()
    await ask(burst("radio", 6), client, server)  # whose prefixes fill the memory
    async with Watch(server) as watch:
        await eventually(lambda: watch.kv_slabs["radio"], "the first look")
        stream = long_stream().start(client, server.url)
        await eventually(lambda: stream.answer.num_events > 10, "the stream is under way")
        asked = asyncio.create_task(ask(burst("speller", 20), client, server))
        await eventually(lambda: watch.kv_slabs["speller"][-1] >= 3, "the burst takes memory")
        assert not stream.answer.is_done
        await asked
        again = await stream.end()
        await ask(burst("radio", 6), client, server)
        least = min(watch.kv_slabs["radio"])
        await eventually(lambda: watch.kv_slabs["radio"][-1] > least, "it comes back")
    assert again.is_done and again.text == alone.text
    assert least <= watch.kv_slabs["radio"][0] - 3, watch.kv_slabs


async def refusal(client: httpx.AsyncClient, server: Server) -> dict[str, Any]:
    """The error with which the broken model refuses a request."""
    answer = await golden_call(BROKEN, golden_answers("speller")[0]).start(client, server.url).end()
    assert answer.status == 503 and answer.error is not None, answer
    assert int(answer.headers["retry-after"]) > 0
    assert answer.error["type"] == "server_error" and answer.error["code"] == "unavailable"
    return answer.error


async def test_a_broken_checkpoint_harms_nobody_and_is_read_again_once_repaired(
    client: httpx.AsyncClient, server: Server, damaged: dict[str, Path]
) -> None:
    error, *_ = await asyncio.gather(
        refusal(client, server),
        *(ask(burst(model, 4), client, server) for model in DEMO),
    )
    file = weights_of(damaged[BROKEN])
    assert str(file) in error["message"]
    listed = (await client.get(f"{server.url}/v1/models")).json()["data"]
    assert {model["id"] for model in listed} == {*DEMO, *damaged}  # what is configured, loaded or not
    report = (await server.models())[BROKEN]
    assert report["state"] == "failed" and report["error"] in error["message"]
    shutil.copyfile(weights_of(DEMO["speller"]), file)
    golden = golden_answers("speller")[0]
    await eventually(lambda: _answers(golden, client, server), "a request loads it")
    assert (await server.models())[BROKEN]["state"] == "active"


async def _answers(golden: GoldenAnswer, client: httpx.AsyncClient, server: Server) -> bool:
    answer = await golden_call(BROKEN, golden).start(client, server.url).end()
    assert answer.status in (200, 503)
    return answer.status == 200 and answer.text == golden.answer


async def load(client: httpx.AsyncClient, server: Server, model: str) -> tuple[int, str | None]:
    """Status and error of the admin endpoint that loads a model."""
    response = await client.post(f"{server.admin}/admin/models/{model}/load")
    return response.status_code, response.json().get("error", {}).get("message")


async def test_the_tensor_that_is_wrong_is_named(
    client: httpx.AsyncClient, server: Server, damaged: dict[str, Path]
) -> None:
    file, norm = weights_of(damaged[LACKING]), "model.norm.weight"
    for _ in range(2):  # a load by command is tried at once, however often it has failed
        status, message = await load(client, server, LACKING)
        assert status == 500 and message is not None and norm in message and str(file.parent) in message
        save_file(load_file(weights_of(DEMO["speller"])) | {norm: torch.zeros(7)}, file)
    shutil.copyfile(weights_of(DEMO["speller"]), file)
    assert await load(client, server, LACKING) == (200, None)
    assert "ended with" not in server.log  # no process has died of it
