"""What a gateway's processor does for each token that it passes on.

Usage: scripts/bench gateway [--streams 256] [--tokens 400] [--endpoint chat] [--interval MS] [--profile FILE]
       [--output results.json]

The gateway is the real process behind its real sockets. Agent, controller and a worker that draws one token
for each stream at a time are this process, and so are the clients. Without an interval the worker says the
next step once the clients have all but two of those before: the gateway is busy all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import uvloop
import zmq.asyncio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prism.config import Config
from prism.gateway import main as gateway_process
from prism.messages import (
    AnyMessage,
    Hello,
    Output,
    Outputs,
    ProcessUp,
    Ready,
    Role,
    Route,
    Routes,
    Started,
    Stop,
    Submit,
    Token,
)
from prism.transport import areceive, asend, bind_router, socket_address
from prism.types import FinishReason

ROOT = Path(__file__).parents[2]
VOCAB = 4096
AHEAD = 2
"""Steps that the worker is ahead of the slowest client."""


def write_model(folder: Path) -> list[int]:
    """config.json and a byte-level BPE tokenizer, learnt from this project's documents; tokens that are whole
    characters, each of which is an event.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(path) for path in sorted(ROOT.glob("docs/**/*.md"))], trainer)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template).save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 8192,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return [token for token in range(1, VOCAB) if tokenizer.decode([token]).isascii()]


def serve(run_dir: Path, config: Config, listener: socket.socket, profile: Path | None) -> None:
    """The gateway's process."""
    if profile is None:
        sys.exit(gateway_process.run(run_dir, "gateway-0", 1, config, listener.detach()))
    recorder = cProfile.Profile()
    recorder.runcall(gateway_process.run, run_dir, "gateway-0", 1, config, listener.detach())
    recorder.dump_stats(profile)


class Peer:
    """One of the other processes, as the gateway sees them."""

    def __init__(self, context: zmq.asyncio.Context, run_dir: Path, file: str) -> None:
        self.address = socket_address(run_dir, file)
        self._socket = bind_router(context, self.address)
        self._gateway: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.heard: asyncio.Queue[AnyMessage] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for sender, message in areceive(self._socket):
            if not self._gateway.done():
                self._gateway.set_result(sender)
            self.heard.put_nowait(message)

    async def say(self, message: AnyMessage) -> None:
        asend(self._socket, message, await self._gateway)

    async def hear(self, kind: type[Any]) -> Any:
        while not isinstance(message := await self.heard.get(), kind):
            pass
        return message

    def close(self) -> None:
        self._reader.cancel()
        self._socket.close(linger=0)


class Client(asyncio.Protocol):
    """One stream; counts its events."""

    def __init__(self, request: bytes, moved: asyncio.Event) -> None:
        self._request = request
        self._moved = moved
        self._tail = b""
        self.num_events = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        seen = self._tail + data
        self.num_events += seen.count(b"\ndata: ")
        self._tail = seen[-6:]
        self._moved.set()
        if b"data: [DONE]" in seen[-64:] and not self.ended.done():
            self.ended.set_result(None)


def _same(client: Client) -> Client:
    return client


def request(endpoint: str, port: int, tokens: int) -> bytes:
    """A whole HTTP request."""
    body: dict[str, Any] = {"model": "m", "max_tokens": tokens, "stream": True}
    path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
    if endpoint == "chat":
        body["messages"] = [{"role": "user", "content": "What is a gateway?"}]
    else:
        body["prompt"] = "What is a gateway?"
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def work(
    worker: Peer, clients: list[Client], moved: asyncio.Event, options: argparse.Namespace
) -> None:
    """Draws for all streams at a time, once all are there."""
    tokens, interval, known = options.tokens, options.interval / 1e3, options.known
    submits: list[Submit] = [await worker.hear(Submit) for _ in clients]
    for submit in submits:
        await worker.say(
            Started(
                request_id=submit.request_id, attempt=1, incarnation=1, queue_seconds=0.0, cached_tokens=0
            )
        )
    draw = random.Random(0)
    begin = time.perf_counter()
    for number in range(tokens):
        if interval:
            await asyncio.sleep(begin + number * interval - time.perf_counter())
        while not interval and min(client.num_events for client in clients) < number - AHEAD:
            moved.clear()
            await moved.wait()
        if number == tokens - 1:
            ends = [
                Output(
                    request_id=submit.request_id,
                    attempt=1,
                    choice=0,
                    index=number,
                    token_ids=[draw.choice(known)],
                    finish=FinishReason.LENGTH,
                )
                for submit in submits
            ]
            await worker.say(Outputs(incarnation=1, items=ends))
            return
        drawn = [Token(submit.request_id, 1, 0, number, draw.choice(known)) for submit in submits]
        await worker.say(Outputs(incarnation=1, tokens=drawn))


async def run_once(
    worker: Peer, port: int, process: psutil.Process, options: argparse.Namespace
) -> dict[str, float]:
    """All streams from the tenth event of the last one on to their ends."""
    moved, data = asyncio.Event(), request(options.endpoint, port, options.tokens)
    clients = [Client(data, moved) for _ in range(options.streams)]
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(partial(_same, each), "127.0.0.1", port) for each in clients]
    working = asyncio.create_task(work(worker, clients, moved, options))
    while min(client.num_events for client in clients) < 10:
        await asyncio.sleep(0.01)
    begun = sum(client.num_events for client in clients)
    busy, begin = sum(process.cpu_times()[:2]), time.perf_counter()
    await asyncio.gather(working, *(client.ended for client in clients))
    count = sum(client.num_events for client in clients) - begun
    busy, seconds = sum(process.cpu_times()[:2]) - busy, time.perf_counter() - begin
    for transport, _ in made:
        transport.close()
    return {"us_per_token": 1e6 * busy / count, "tokens_s": count / seconds}


async def measure(
    run_dir: Path, port: int, process: psutil.Process, options: argparse.Namespace
) -> dict[str, Any]:
    """Passes all tokens through the gateway that is starting."""
    context = zmq.asyncio.Context()
    peers = agent, controller, worker = [
        Peer(context, run_dir, file) for file in ("agent", "controller.1", "worker-0.1")
    ]
    await agent.hear(Ready)
    for role, name, peer in ((Role.CONTROLLER, "controller", controller), (Role.WORKER, "worker-0", worker)):
        await agent.say(ProcessUp(role=role, name=name, incarnation=1, address=peer.address))
    await controller.hear(Hello)
    await controller.say(Routes(epoch=1, version=1, routes=[Route(model="m", workers=["worker-0"])]))
    runs = [await run_once(worker, port, process, options) for _ in range(options.runs)]
    await agent.say(Stop(grace=1.0))
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        await asyncio.sleep(0.01)
    for peer in peers:
        peer.close()
    context.term()
    medians = {key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]}
    return medians | {"runs": [{key: round(value, 1) for key, value in run.items()} for run in runs]}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--endpoint", choices=("chat", "completions"), default="completions")
    parser.add_argument("--interval", type=float, default=0.0, help="milliseconds between two steps")
    parser.add_argument("--profile", type=Path, help="write the gateway's profile there")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.known = write_model(folder)
        config = Config.model_validate(
            {
                "models": [{"name": "m", "path": name}],
                "server": {"log_level": "warning"},
                "limits": {"max_queue": 4096},
            }
        )
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listener.getsockname()[1]
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = name  # as an agent does for its processes
        child = multiprocessing.get_context("spawn").Process(
            target=serve, args=(folder, config, listener, options.profile)
        )
        child.start()
        result = uvloop.run(measure(folder, port, psutil.Process(child.pid), options))
        child.join(10)
    chosen = {key: getattr(options, key) for key in ("streams", "tokens", "endpoint", "interval")}
    result = chosen | result
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
