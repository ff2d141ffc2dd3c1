"""A model directory, a worker that says what a test tells it, and links without sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from prism.clock import ManualClock
from prism.config import Config
from prism.demo.tokenizer import CHATML, build_tokenizer
from prism.gateway.app import create_app
from prism.gateway.requests import Placement
from prism.gateway.service import Gateway
from prism.messages import (
    CancelChoice,
    Demand,
    Output,
    Outputs,
    Rejected,
    Route,
    Routes,
    Started,
    Submit,
    Token,
    TokenLogprob,
)
from prism.metrics import Metrics
from prism.types import FinishReason, Incarnation, WorkerId
from tests.support.waiting import eventually

MODEL = "org/tiny"
CONTEXT = 512
IM_END = CHATML.token_id("<|im_end|>")


def write_model(path: Path, **config: Any) -> Path:
    """A directory with everything but weights: one token per byte, ChatML."""
    build_tokenizer(CHATML, CONTEXT).save_pretrained(path)
    values = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": [IM_END, 256],
    }
    (path / "config.json").write_text(json.dumps(values | config))
    return path


def make_config(path: Path, **sections: Any) -> Config:
    models = sections.pop("models", [{"name": MODEL, "path": str(path)}])
    return Config.model_validate({"models": models, **sections})


@dataclass
class Script:
    """What a worker answers to every request. `text` goes out token by token."""

    text: str = "hello"
    finish: FinishReason = FinishReason.STOP
    top: int = 2
    stop_after: int | None = None
    """Falls silent after so many tokens."""
    reject: Any = None
    starts: bool = True
    cached: int = 3
    together: bool = False
    """All tokens in one message."""

    def answers(self, submit: Submit, incarnation: int) -> Iterator[Outputs | Started | Rejected]:
        head: dict[str, Any] = {"request_id": submit.request_id, "attempt": submit.attempt}
        if self.reject is not None:
            yield Rejected(**head, incarnation=incarnation, error=self.reject)
            return
        if not self.starts:
            return
        yield Started(**head, incarnation=incarnation, queue_seconds=0.25, cached_tokens=self.cached)
        items = [item for c in range(submit.params.n) for item in self._outputs(submit, c, head)]
        if self.together:
            yield Outputs(incarnation=incarnation, items=items)
            return
        for item in items:
            yield _outputs(incarnation, item)

    def _outputs(self, submit: Submit, choice: int, head: dict[str, Any]) -> Iterator[Output]:
        resumed = {each.choice: each for each in submit.resumed}
        done = resumed.get(choice)
        if done is not None and done.finished:
            return
        start = 0 if done is None else len(done.token_ids)
        tokens = list(self.text.encode())[: submit.params.max_tokens]
        for index in range(start, len(tokens)):
            if self.stop_after is not None and index >= self.stop_after:
                return
            logprobs = None
            if submit.params.logprobs is not None:
                top = [(tokens[index] - n, -0.5 - n) for n in range(submit.params.logprobs)]
                logprobs = [TokenLogprob(-0.5, top)]
            yield Output(**head, choice=choice, index=index, token_ids=[tokens[index]], logprobs=logprobs)
        is_stop = self.finish is FinishReason.STOP and len(tokens) < submit.params.max_tokens
        yield Output(
            **head,
            choice=choice,
            index=len(tokens),
            token_ids=[],
            finish=FinishReason.STOP if is_stop else FinishReason.LENGTH,
            stop_token=IM_END if is_stop else None,
        )


def _outputs(incarnation: int, item: Output) -> Outputs:
    """As a worker sends it."""
    if item.finish is not None or item.logprobs is not None:
        return Outputs(incarnation=incarnation, items=[item])
    token = Token(item.request_id, item.attempt, item.choice, item.index, item.token_ids[0])
    return Outputs(incarnation=incarnation, tokens=[token])


def place(worker: str = "w0", incarnation: int = 1) -> Placement:
    return Placement(WorkerId(worker), Incarnation(incarnation))


def routes(*workers: str, model: str = MODEL, version: int = 1) -> Routes:
    return Routes(epoch=1, version=version, routes=[Route(model=model, workers=list(workers))])


@dataclass
class FakeLinks:
    """Records what is sent; a request is answered by the script, soon, if there is one."""

    script: Script | Callable[[Submit], Script] | None = None
    sent: list[tuple[Placement, Submit | CancelChoice]] = field(default_factory=list)
    demands: list[str] = field(default_factory=list)
    gateway: Gateway | None = None

    def to_worker(self, placement: Placement, message: Submit | CancelChoice) -> None:
        self.sent.append((placement, message))
        if isinstance(message, Submit) and self.script is not None:
            asyncio.get_running_loop().call_soon(self.answer, placement, message)

    def answer(self, placement: Placement, submit: Submit) -> None:
        assert self.gateway is not None
        script = self.script if isinstance(self.script, Script) else self.script(submit)  # type: ignore[misc]
        for message in script.answers(submit, placement.incarnation):
            self.gateway.on_worker_message(placement, message)

    def to_controller(self, message: Demand) -> None:
        self.demands.append(message.model)

    @property
    def submits(self) -> list[Submit]:
        return [message for _, message in self.sent if isinstance(message, Submit)]

    @property
    def cancels(self) -> list[CancelChoice]:
        return [message for _, message in self.sent if isinstance(message, CancelChoice)]


@dataclass
class World:
    """A gateway whose worker is a script."""

    gateway: Gateway
    links: FakeLinks
    clock: ManualClock
    client: httpx.AsyncClient

    async def chat(self, **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", None)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)

    async def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": "hi", **fields}
        return await self.client.post("/v1/completions", json=body)


@asynccontextmanager
async def running(
    config: Config, script: Script | Callable[[Submit], Script] | None = None, *, ready: bool = True
) -> AsyncIterator[World]:
    """The whole application but uvicorn and zmq."""
    links, clock = FakeLinks(script), ManualClock()
    gateway = Gateway(config, links, clock, Metrics())
    links.gateway = gateway
    if ready:
        gateway.on_routes(routes("w0"))
        gateway.on_worker_up(place())
    gateway.text_models.start()
    timers = asyncio.create_task(gateway.run_timers())
    transport = httpx.ASGITransport(create_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://prism") as client:
        yield World(gateway, links, clock, client)
    gateway.dispatcher.check()
    timers.cancel()
    await asyncio.gather(timers, return_exceptions=True)
    gateway.close()


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop turn until the condition holds. Threads may be at work, so turns say nothing of time."""
    await eventually(condition, "it is so", pause=0)


def events(body: str) -> list[Any]:
    """The JSON of a stream's events; `[DONE]` is a string."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def concatenated(chunks: Sequence[Any]) -> str:
    """The text of a chat stream with one choice."""
    return "".join(
        c["choices"][0]["delta"].get("content", "") for c in chunks if c != "[DONE]" and c["choices"]
    )
