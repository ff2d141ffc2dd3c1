"""A whole gateway on a real port, with real zmq sockets to an agent, a controller and workers."""

from pathlib import Path

import httpx
import openai
import pytest

from prism.config import Config
from tests.gateway.fakes import MODEL, Script
from tests.gateway.processes import cluster

pytestmark = pytest.mark.anyio


def client_of(port: int) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0)


async def test_the_official_client(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism, client_of(prism.port) as client:
        prism.start_controller()
        worker = prism.start_worker(Script("Grüße, 😀!"))
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], seed=7
        )
        assert answer.choices[0].message.content == "Grüße, 😀!"
        again = [{"role": "user", "content": "hi"}, answer.choices[0].message.model_dump()]
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[*again, {"role": "user", "content": "more"}],  # type: ignore[list-item]
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == "Grüße, 😀!"
        assert chunks[-1].usage is not None
        completion = await client.completions.create(model=MODEL, prompt=[104, 105], max_tokens=2)
        assert completion.choices[0].text == "Gr"
        assert completion.choices[0].finish_reason == "length"
        assert worker.submits[0].params.seed == 7
        assert [model.id async for model in client.models.list()] == [MODEL]


async def test_health_tells_when_requests_can_be_served(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{prism.port}/health"
        assert (await client.get(url)).status_code == 503
        controller = prism.start_controller()
        worker = prism.start_worker(Script())
        await prism.wait(lambda: controller.heard and worker.heard)
        response = await client.get(url)
        while response.status_code == 503:
            response = await client.get(url)
        assert response.json()["status"] == "ok"


async def test_stop_ends_the_process_with_code_0(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism:
        prism.stop(5)
        assert await prism.serving == 0


async def test_a_lost_agent_ends_the_process(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism:
        prism.agent.close()
        assert await prism.serving == 1
