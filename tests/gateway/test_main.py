"""A whole gateway on a real port, with real zmq sockets to an agent, a controller and workers."""

import asyncio
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
import zmq.asyncio

from prism.config import Config
from prism.gateway import heads
from prism.messages import Demand, Ready, WeightsFailed
from tests.gateway.fakes import MODEL, Script
from tests.gateway.processes import Peer, cluster
from tests.support.waiting import PATIENCE

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
    async with (
        cluster(config, tmp_path) as prism,
        httpx.AsyncClient(trust_env=False, verify=False, timeout=PATIENCE) as client,
    ):
        url = f"http://127.0.0.1:{prism.port}/health"
        assert (await client.get(url)).status_code == 503
        controller = prism.start_controller()
        worker = prism.start_worker(Script())
        await prism.wait(lambda: controller.heard and worker.heard)
        response = await client.get(url)
        while response.status_code == 503:
            response = await client.get(url)
        assert response.json()["status"] == "ok"
        prism.agent.say(WeightsFailed(model=MODEL, reason="no weights"))
        while response.json()["unavailable_models"] != {MODEL: "no weights"}:
            response = await client.get(url)


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


async def answer_to(port: int, *pieces: bytes) -> bytes:
    """All that comes until the gateway closes the connection; it is reset if that had not read all."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    with suppress(ConnectionError):
        async with asyncio.timeout(PATIENCE):
            writer.write(b"".join(pieces))
            while piece := await reader.read(65536):
                answer += piece
    writer.close()
    return answer


@pytest.mark.parametrize("begun", [b"", b"P", HEAD, b"GET /health HTTP/1.1\r\n\r\n" + HEAD])
async def test_a_head_that_never_ends(
    begun: bytes, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection stayed for ever."""
    monkeypatch.setattr(heads, "HEAD_SECONDS", 0.3)
    async with cluster(config, tmp_path) as prism:
        answer = await answer_to(prism.port, begun)
        assert answer.endswith(b"The head of the request did not arrive.")
        assert answer.count(b"HTTP/1.1 ") == 1 + begun.startswith(b"GET")


async def test_a_head_without_bound(config: Config, tmp_path: Path) -> None:
    """One of 10 MB was taken. The bound concerns no body, and no later request on its connection."""
    async with cluster(config, tmp_path) as prism:
        endless = [HEAD, *[b"x-a: " + b"a" * 60_000 + b"\r\n" for _ in range(20)]]
        refusal = await answer_to(prism.port, *endless)
        assert refusal.endswith(b"too large.") or not refusal  # a reset may overtake it
        body = b" " * 1_000_000
        large = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        last = b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n"
        answer = await answer_to(prism.port, large, large, last)
        assert answer.count(b"is not JSON") == 2 and answer.count(b"HTTP/1.1 503") == 1


async def test_a_client_of_http_1_0_gets_no_chunks(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism:
        prism.start_controller()
        prism.start_worker(Script("abc", stop_after=3))
        body = b'{"model": "%s", "prompt": "x", "stream": true}' % MODEL.encode()
        head = b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body)
        answer = await answer_to(prism.port, head, body)
        start, _, events = answer.partition(b"\r\n\r\n")
        assert b"chunked" not in start and b"connection: close" in start
        assert events.startswith(b"data: {") and events.endswith(b"data: [DONE]\n\n")
        whole = await answer_to(prism.port, b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert b"content-length: " in whole and whole.endswith(b"]}")


async def test_whoever_probes_may_leave_the_body_out(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism:
        for path, status in (("/health", b"503"), ("/metrics", b"200"), ("/v1/models", b"200")):
            head = f"HEAD {path} HTTP/1.1\r\nconnection: close\r\n\r\n".encode()
            answer = await answer_to(prism.port, head)
            assert answer.startswith(b"HTTP/1.1 " + status) and answer.endswith(b"\r\n\r\n")


async def test_stop_ends_the_process_with_code_0(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism:
        prism.stop(5)
        assert await prism.serving == 0


async def test_a_lost_agent_ends_the_process(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism:
        prism.agent.close()
        assert await prism.serving == 1


async def test_a_worker_dies_and_its_successor_goes_on(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism, client_of(prism.port) as client:
        prism.start_controller()
        first = prism.start_worker(Script("Grüße, 😀!", stop_after=9))
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        text = ""
        second = None
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if second is None and "ß" in text:
                prism.kill_worker(first)
                second = prism.start_worker(Script("Grüße, 😀!"), incarnation=2)
        assert text == "Grüße, 😀!"
        assert second is not None
        assert second.submits[0].attempt == 2


async def test_hanging_up_reaches_the_worker(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism:
        prism.start_controller()
        worker = prism.start_worker(Script("abc", stop_after=1))
        async with client_of(prism.port) as client:
            stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
            await anext(aiter(stream))
            await stream.close()
        await prism.wait(lambda: worker.cancels)


async def test_an_idle_request_without_stream_is_cancelled_too(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism:
        prism.start_controller()
        worker = prism.start_worker(Script(starts=False))
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=PATIENCE) as client:
            body = {"model": MODEL, "prompt": "x"}
            url = f"http://127.0.0.1:{prism.port}/v1/completions"
            call = asyncio.create_task(client.post(url, json=body))
            await prism.wait(lambda: worker.submits)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        await prism.wait(lambda: worker.cancels)


async def test_a_controller_that_comes_back_hears_of_demands(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism, client_of(prism.port) as client:
        prism.start_worker(Script("ok"))
        answer = asyncio.create_task(client.completions.create(model=MODEL, prompt="x"))
        controller = prism.start_controller()
        controller.eager = False
        assert (await answer).choices[0].text == "ok"
        assert any(isinstance(message, Demand) for message in controller.heard)


async def test_a_request_in_flight_ends_before_the_process(config: Config, tmp_path: Path) -> None:
    async with cluster(config, tmp_path) as prism, client_of(prism.port) as client:
        prism.start_controller()
        prism.start_worker(Script("abc", stop_after=1))
        stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
        prism.stop(0.05)
        with pytest.raises(openai.APIError, match="shutting down"):
            [chunk async for chunk in stream]
        assert await prism.serving == 0


CHILD = """
import sys
from contextlib import suppress
from pathlib import Path
from prism.config import Config
from prism.gateway import heads
from prism.gateway.main import run
code = run(Path(sys.argv[1]), "g0", 1, Config.model_validate_json(sys.argv[2]), int(sys.argv[3]))
assert "torch" not in sys.modules
sys.exit(code)
"""


async def test_a_process_of_its_own(config: Config, tmp_path: Path) -> None:
    context = zmq.asyncio.Context()
    agent = Peer(context, tmp_path, "agent")
    listener = socket.create_server(("127.0.0.1", 0))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), config.model_dump_json(), str(listener.fileno())],
        pass_fds=[listener.fileno()],
        stderr=subprocess.PIPE,
    )
    try:
        async with client_of(listener.getsockname()[1]) as client:
            models = await client.models.list()  # the socket takes connections before the process does
            assert models.data[0].id == MODEL
        child.send_signal(signal.SIGTERM)
        _, errors = await asyncio.to_thread(child.communicate)
        assert child.returncode == 0, errors.decode()
        assert b"Traceback" not in errors
        assert any(isinstance(message, Ready) for message in agent.heard)
    finally:
        child.kill()
        child.wait()
        listener.close()
        agent.close()
        context.term()


def test_no_torch(model_dir: Path) -> None:
    code = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
import prism.gateway.main
from prism.config import ModelConfig
from prism.gateway.tokenizers import Vocabularies, load_text_model
model = load_text_model(ModelConfig(name="m", path={str(model_dir)!r}), Vocabularies())
model.vocabulary.tokenizer.apply_chat_template([{{"role": "user", "content": "x"}}], tokenize=False)
assert "torch" not in sys.modules, "torch"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


async def raw(port: int, data: bytes, *, hang_up: bool = False) -> bytes:
    """What a server answers to bytes; the client sends no more, and may leave at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await writer.drain()
    answer = b"" if hang_up else await reader.read(4000)
    writer.close()
    await writer.wait_closed()
    return answer


async def test_a_large_body_is_refused_before_it_is_sent(config: Config, tmp_path: Path) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n"
    async with cluster(config, tmp_path) as prism:
        answer = await raw(prism.port, head + b" " * 1000)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"request_too_large" in answer


async def test_a_body_that_never_comes_harms_nobody(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
    async with cluster(config, tmp_path) as prism:
        await raw(prism.port, head, hang_up=True)
        assert (await raw(prism.port, b"junk\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
        prism.stop(5)
        assert await prism.serving == 0
    assert "internal error" not in caplog.text
