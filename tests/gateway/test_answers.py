"""Answers under difficulties: deaths, stops, clients that leave, full queues."""

import asyncio
import json
import shutil
from typing import Any

import msgspec
import pytest
from openai.types.chat import ChatCompletion

from prism.config import Config
from prism.errors import Overloaded
from prism.gateway.app import create_app
from prism.messages import ModelReport, Rejected, Report, Submit, WeightsFailed, WeightsHeld
from prism.types import ModelState
from tests.gateway.fakes import (
    CONTEXT,
    IM_END,
    MODEL,
    Script,
    World,
    concatenated,
    events,
    make_config,
    place,
    routes,
    running,
    until,
)

pytestmark = pytest.mark.anyio


class Caller:
    """A client below httpx, which can read a stream as it comes and hang up."""

    def __init__(self, world: World, path: str, body: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.hung_up = asyncio.Event()
        self.may_read = asyncio.Event()
        self.may_read.set()
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
            "scheme": "http",
            "server": ("prism", 80),
        }
        self.task = asyncio.create_task(create_app(world.gateway)(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        await self.may_read.wait()

    @property
    def text(self) -> str:
        return b"".join(m["body"] for m in self.sent if m["type"] == "http.response.body").decode()


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}


async def test_the_prompt_and_the_sampling_reach_the_worker(config: Config) -> None:
    async with running(config, Script()) as world:
        messages = [
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "tool_calls": None},
            {"role": "user", "content": "d"},
        ]
        await world.chat(
            messages=messages,
            temperature=0,
            top_k=-1,
            logit_bias={"5": -100},
            stop_token_ids=[7],
            seed=-5,
            max_completion_tokens=9,
            headers={"x-slo-ttft-ms": "1500", "x-slo-tpot-ms": "50"},
            tools=None,
            tool_choice="auto",
            response_format={"type": "text"},
            store=False,
            user="me",
        )
        submit = world.links.submits[0]
        assert bytes(token for token in submit.prompt if token < 256).decode() == (
            "system\nbe kind\nuser\nab\nassistant\nc\nuser\nd\nassistant\n"
        )
        params = submit.params
        assert (params.temperature, params.top_k, params.seed, params.max_tokens) == (0, 0, -5, 9)
        assert params.logit_bias == {5: -100}
        assert params.stop_token_ids == (IM_END, 256, 7)
        assert (submit.slo.ttft, submit.slo.tpot) == (1.5, 0.05)
        assert submit.latest_end == submit.arrival + 600
        assert not submit.clip_max_tokens


async def test_defaults_come_from_the_model(config: Config, model_dir: Any, tmp_path: Any) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 20, "eos_token_id": 7}')
    async with running(make_config(copy), Script()) as world:
        await world.chat(ignore_eos=True)
        await world.chat(temperature=1, top_k=0)
        first, second = world.links.submits
        assert (first.params.temperature, first.params.top_k) == (0.5, 20)
        assert first.params.stop_token_ids == ()
        assert first.clip_max_tokens
        assert first.params.max_tokens == 512 - len(first.prompt)
        assert (second.params.temperature, second.params.top_k) == (1, 0)
        assert second.params.stop_token_ids == (7,)
        assert first.params.seed != second.params.seed


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("together", [False, True])
async def test_a_stop_string_ends_and_cancels_a_choice(config: Config, stream: bool, together: bool) -> None:
    async with running(config, Script("one two three", together=together)) as world:
        response = await world.chat(stop=["tw", "ne th"], stream=stream, logprobs=True)
        if stream:
            chunks = events(response.text)
            assert concatenated(chunks) == "one "
            assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
            logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1]]
            entries = [entry for each in logprobs if each for entry in each["content"]]
        else:
            answer = ChatCompletion.model_validate_json(response.content, strict=True)
            assert answer.choices[0].message.content == "one "
            assert answer.choices[0].finish_reason == "stop"
            assert answer.usage is not None
            assert answer.usage.completion_tokens == len("one tw")
            entries = response.json()["choices"][0]["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == "one "
        assert [cancel.choice for cancel in world.links.cancels] == [0]


async def test_stop_strings_are_looked_for_behind_min_tokens(config: Config) -> None:
    """One among the first `min_tokens` tokens ended the answer."""
    async with running(config, Script("one two two")) as world:
        response = await world.chat(stop=["two", "e"], min_tokens=7)
        answer = response.json()
        assert answer["choices"][0]["message"]["content"] == "one two "
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 11


async def test_a_stop_string_that_the_last_bytes_complete(config: Config) -> None:
    async with running(config, Script("ab\xff".encode("latin-1").decode("latin-1"))) as world:
        response = await world.chat(stop="b\xff")
        assert response.json()["choices"][0]["message"]["content"] == "a"


async def test_logprobs_in_a_chat(config: Config) -> None:
    async with running(config, Script("é!")) as world:
        response = await world.chat(logprobs=True, top_logprobs=1, max_tokens=3)
        answer = ChatCompletion.model_validate_json(response.content, strict=True)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [entry.bytes for entry in logprobs.content] == [[0xC3], [0xA9], [0x21]]
        assert [entry.token for entry in logprobs.content] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
        assert logprobs.content[2].top_logprobs[0].token == "!"
        assert answer.choices[0].finish_reason == "length"


async def test_no_stream_event_tears_a_character(config: Config) -> None:
    async with running(config, Script("😀é€" * 5)) as world:
        chunks = events((await world.chat(stream=True, max_tokens=44)).text)
        assert concatenated(chunks) == "😀é€" * 4 + "😀é"  # and two bytes that max_tokens has cut off
        assert not any("\ufffd" in str(chunk) for chunk in chunks)


async def test_bytes_without_their_character_have_logprobs_and_no_text(config: Config) -> None:
    """A cut answer ended with a replacement character, which is text that no model had written."""
    async with running(config, Script("a€")) as world:
        response = await world.chat(logprobs=True, max_tokens=3)
        choice = response.json()["choices"][0]
        assert choice["message"]["content"] == "a" and choice["finish_reason"] == "length"
        assert [entry["bytes"] for entry in choice["logprobs"]["content"]] == [[0x61], [0xE2], [0x82]]
        assert response.json()["usage"]["completion_tokens"] == 3


async def test_several_choices_stream_in_order(config: Config) -> None:
    async with running(config, Script("abc")) as world:
        chunks = events((await world.chat(stream=True, n=3)).text)
        for choice in range(3):
            own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice]
            assert own[0]["delta"]["role"] == "assistant"
            assert "".join(c["delta"].get("content", "") for c in own) == "abc"
            assert own[-1]["finish_reason"] == "stop"


async def test_a_worker_dies_mid_stream_and_the_text_goes_on(config: Config) -> None:
    def script(submit: Submit) -> Script:
        return Script("Grüße, 😀!", stop_after=8 if submit.attempt == 1 else None)

    async with running(config, script) as world:
        caller = Caller(
            world, "/v1/chat/completions", chat_body(stream=True, stream_options={"include_usage": True})
        )
        await until(lambda: "ü" in caller.text)
        world.gateway.on_worker_ended(place())
        assert world.links.submits[-1].attempt == 1
        world.gateway.on_worker_up(place(incarnation=2))
        await caller.task
        chunks = events(caller.text)
        assert concatenated([c for c in chunks if c != "[DONE]" and c["choices"]]) == "Grüße, 😀!"
        assert chunks[-2]["usage"]["completion_tokens"] == len("Grüße, 😀!".encode()) + 1
        assert world.links.submits[1].resumed[0].token_ids == list("Grüße, 😀!".encode()[:8])
        metrics = world.gateway.metrics.text().decode()
        assert f'prism:resubmissions_total{{model_name="{MODEL}"}} 1.0' in metrics


async def test_three_deaths_are_an_error_event_after_the_first_byte(config: Config) -> None:
    async with running(config, Script("abcdef", stop_after=2)) as world:
        caller = Caller(world, "/v1/chat/completions", chat_body(stream=True))
        for incarnation in range(1, 6):
            await until(lambda n=incarnation: len(world.links.submits) == n or caller.task.done())
            await until(lambda: '"b"' in caller.text)
            if caller.task.done():
                break
            await asyncio.sleep(0)
            world.gateway.on_worker_ended(place(incarnation=incarnation))
            world.gateway.on_worker_up(place(incarnation=incarnation + 1))
        await caller.task
        last = events(caller.text)[-1]
        assert last["error"]["type"] == "server_error"
        assert last["error"]["code"] == "engine_failure"
        assert [submit.alone for submit in world.links.submits] == [False, False, False, True]


async def test_a_prompt_that_fails_cancels_the_others_though_nobody_reads(config: Config) -> None:
    """They went on until the client had read all that had come before."""
    async with running(config, Script("abcdef", stop_after=2)) as world:
        caller = Caller(world, "/v1/completions", {"model": MODEL, "prompt": ["a", "b"], "stream": True})
        caller.may_read.clear()
        await until(lambda: len(world.links.submits) == 2 and caller.sent)
        failing, other = world.links.submits
        error = Overloaded("full").wire()
        rejected = Rejected(request_id=failing.request_id, attempt=1, incarnation=1, error=error)
        world.gateway.on_worker_message(place(), rejected)
        await until(lambda: world.links.cancels)
        assert [cancel.request_id for cancel in world.links.cancels] == [other.request_id]
        assert len(world.gateway.dispatcher) == 0 and len(caller.sent) == 1
        caller.may_read.set()
        await caller.task
        assert events(caller.text)[-1]["error"]["message"] == "full"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels(config: Config, stream: bool) -> None:
    async with running(config, Script("abcdef", stop_after=2)) as world:
        caller = Caller(world, "/v1/chat/completions", chat_body(stream=stream))
        await until(lambda: world.links.submits and (caller.sent or not stream))
        caller.hung_up.set()
        await caller.task
        assert [(c.choice, c.attempt) for c in world.links.cancels] == [(None, 1)]
        assert len(world.gateway.dispatcher) == 0


async def test_a_client_that_leaves_a_held_request(config: Config) -> None:
    async with running(config, ready=False) as world:
        caller = Caller(world, "/v1/chat/completions", chat_body())
        await until(lambda: world.links.demands)
        caller.hung_up.set()
        await caller.task
        assert len(world.gateway.dispatcher) == 0


async def test_a_held_request_is_served_when_its_route_comes(config: Config) -> None:
    async with running(config, Script("ok"), ready=False) as world:
        answer = asyncio.create_task(world.chat())
        await until(lambda: world.links.demands == [MODEL])
        held = 'prism:num_requests_waiting{model_name="org/tiny"} 1.0'
        await until(lambda: held in world.gateway.metrics.text().decode())
        world.gateway.on_worker_up(place())
        world.gateway.on_routes(routes("w0"))
        assert (await answer).json()["choices"][0]["message"]["content"] == "ok"


async def test_a_request_without_a_route_is_overloaded_in_the_end(config: Config) -> None:
    async with running(config, ready=False) as world:
        answer = asyncio.create_task(world.chat())
        await until(lambda: world.links.demands)
        await asyncio.sleep(0)
        world.clock.advance(61)
        response = await answer
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "overloaded"


async def test_a_worker_s_refusal_is_the_client_s(config: Config) -> None:
    error = Overloaded("the queue is full", retry_after=2.5).wire()
    async with running(config, Script(reject=error)) as world:
        for stream in (False, True):
            response = await world.chat(stream=stream)
            assert response.status_code == 429
            assert response.headers["retry-after"] == "3"
            assert response.json()["error"]["message"] == "the queue is full"


async def test_one_failed_prompt_fails_the_others(config: Config) -> None:
    error = Overloaded("no", param="prompt").wire()

    def script(submit: Submit) -> Script:
        return Script(reject=error) if submit.prompt == [121] else Script(starts=False)

    async with running(config, script) as world:
        response = await world.complete(prompt=["x", "y", "z"])
        assert response.status_code == 429
        assert len(world.links.cancels) == 2


async def test_params_of_a_worker_s_errors_are_translated(config: Config) -> None:
    error = Overloaded("too long", param="prompt").wire()
    async with running(config, Script(reject=error)) as world:
        assert (await world.chat()).json()["error"]["param"] == "messages"
        assert (await world.complete()).json()["error"]["param"] == "prompt"


async def test_stop_refuses_new_requests_and_ends_the_old(config: Config) -> None:
    async with running(config, Script("abcdef", stop_after=2)) as world:
        caller = Caller(world, "/v1/chat/completions", chat_body(stream=True))
        await until(lambda: caller.sent)
        stopping = asyncio.create_task(world.gateway.stopped())
        await asyncio.sleep(0)
        world.gateway.begin_stop(60)
        world.gateway.begin_stop(30)
        world.gateway.begin_stop(90)
        response = await world.chat()
        assert response.status_code == 503
        assert "retry-after" in response.headers
        assert (await world.client.get("/health")).json()["status"] == "stopping"
        assert not caller.task.done()
        await asyncio.sleep(0)
        world.clock.advance(30)
        await stopping
        await caller.task
        assert "shutting down" in events(caller.text)[-1]["error"]["message"]


async def test_stop_waits_for_streams(config: Config) -> None:
    async with running(config, Script("abc", stop_after=1)) as world:
        caller = Caller(world, "/v1/chat/completions", chat_body(stream=True))
        await until(lambda: caller.sent)
        stopping = asyncio.create_task(world.gateway.stopped())
        await asyncio.sleep(0)
        world.gateway.begin_stop(60)
        world.gateway.begin_stop(30)
        world.gateway.begin_stop(90)
        world.links.script = Script("abc")
        world.links.answer(place(), world.links.submits[0])
        await stopping
        await caller.task
        assert events(caller.text)[-1] == "[DONE]"
        assert concatenated(events(caller.text)) == "abc"


async def test_request_ids(config: Config) -> None:
    async with running(config, Script()) as world:
        given = await world.chat(headers={"x-request-id": "my-id:1"})
        assert given.headers["x-request-id"] == "my-id:1"
        for odd in ("a b", "x" * 200, "<script>"):
            made = await world.chat(headers={"x-request-id": odd})
            assert made.headers["x-request-id"] != odd
        assert (await world.client.get("/nope")).headers["x-request-id"]


async def test_a_bug_is_an_error_too(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(config, Script()) as world:
        monkeypatch.setattr(world.gateway.dispatcher, "open", lambda *_: 1 / 0)
        response = await world.chat()
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert response.headers["x-request-id"]


async def test_metrics_tell_what_happened(config: Config) -> None:
    async with running(config, Script("abc")) as world:
        await world.chat(stream=True)
        await world.chat(max_tokens=2)
        text = (await world.client.get("/metrics")).text
        label = f'model_name="{MODEL}"'
        assert f'prism:request_success_total{{finished_reason="stop",{label}}} 1.0' in text
        assert f'prism:request_success_total{{finished_reason="length",{label}}} 1.0' in text
        assert f"prism:generation_tokens_total{{{label}}} 6.0" in text
        assert f"prism:time_to_first_token_seconds_count{{{label}}} 2.0" in text
        assert f"prism:inter_token_latency_seconds_count{{{label}}} 4.0" in text
        assert f"prism:request_queue_time_seconds_sum{{{label}}} 0.5" in text


async def test_a_broken_model_harms_only_itself(config: Config, tmp_path: Any) -> None:
    models = [{"name": "broken", "path": str(tmp_path)}, config.models[0].model_dump()]
    async with running(make_config(tmp_path, models=models), Script("fine")) as world:
        response = await world.chat(model="broken")
        assert response.status_code == 503
        assert "tokenizer.json" in response.json()["error"]["message"]
        assert (await world.chat()).status_code == 200
        health = (await world.client.get("/health")).json()
        assert "tokenizer.json" in health["unavailable_models"]["broken"]


async def test_models_tell_the_longest_context_that_their_memory_allows(config: Config) -> None:
    async with running(config, Script("x")) as world:

        async def told() -> int | None:
            found: int | None = (await world.client.get(f"/v1/models/{MODEL}")).json()["max_model_len"]
            return found

        await world.complete()
        assert await told() == CONTEXT
        world.gateway.on_worker_message(place("w0"), report("w0", ModelState.COLD, 0))
        assert await told() == CONTEXT
        world.gateway.on_worker_message(place("w0"), report("w0", ModelState.ACTIVE, 0, max_len=CONTEXT // 2))
        assert await told() == CONTEXT // 2


async def test_health_names_workers_that_do_not_report(config: Config) -> None:
    async with running(config) as world:
        health = (await world.client.get("/health")).json()
        assert (health["status"], health["silent_workers"]) == ("ok", [])
        silent = msgspec.structs.replace(routes("w0", version=2), silent=["w0", "gone"])
        world.gateway.on_routes(silent)
        response = await world.client.get("/health")
        assert response.status_code == 200
        assert response.json()["status"] == "degraded" and response.json()["silent_workers"] == ["w0"]


async def test_health_names_models_whose_weights_cannot_be_packed(config: Config) -> None:
    """Only directories that the gateway itself could not read were told. A request has it tried again."""
    async with running(config, Script("fine")) as world:
        world.gateway.on_packing(WeightsFailed(model=MODEL, reason="model.safetensors: truncated"))
        health = (await world.client.get("/health")).json()
        assert health["unavailable_models"] == {MODEL: "model.safetensors: truncated"}
        assert (await world.chat()).status_code == 200
        world.gateway.on_packing(WeightsHeld(model=MODEL, total_bytes=7))
        assert (await world.client.get("/health")).json()["unavailable_models"] == {}


def with_template(config: Config, tmp_path: Any, template: str | None) -> Config:
    copy = shutil.copytree(config.models[0].path, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (copy / "chat_template.jinja").write_text(template)
    return make_config(copy)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "the chat template refused"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template refused"),
        ("{% for i in range(10**9) %}x{% endfor %}", "the chat template refused"),
        ("{{ messages[99].content }}{{ 1 / 0 }}", "the chat template refused"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too much memory"),
    ],
)
async def test_bad_templates(config: Config, tmp_path: Any, template: str | None, message: str) -> None:
    async with running(with_template(config, tmp_path, template), Script("fine")) as world:
        response = await world.chat()
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == "messages"
        assert (await world.complete()).status_code == 200


async def test_variables_of_a_template(config: Config, tmp_path: Any) -> None:
    template = "{{ messages[0].content }}{% if enable_thinking %} think{% endif %}"
    async with running(with_template(config, tmp_path, template), Script("fine")) as world:
        await world.chat(chat_template_kwargs={"enable_thinking": True})
        await world.chat()
        assert [bytes(s.prompt) for s in world.links.submits] == [b"hi think", b"hi"]


async def test_an_endless_template_is_interrupted(
    config: Config, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = 1 %}{% endfor %}{% endfor %}"
    monkeypatch.setattr("prism.gateway.prepare.Alarm.__init__.__defaults__", (0.05,))
    async with running(with_template(config, tmp_path, loops), Script("fine")) as world:
        responses = await asyncio.gather(*(world.chat() for _ in range(3)))
        assert all("took longer" in response.json()["error"]["message"] for response in responses)
        assert (await world.complete()).status_code == 200


def report(worker: str, state: ModelState, num_waiting: int, max_len: int | None = None) -> Report:
    model = ModelReport(
        model=MODEL,
        state=state,
        weights_bytes=0,
        kv_used_bytes=0,
        kv_cached_bytes=0,
        kv_slab_bytes=0,
        kv_floor_bytes=0,
        kv_limit_bytes=None,
        num_running=0,
        num_waiting=num_waiting,
        load_progress=0,
        idle_seconds=0,
        num_activations=0,
        max_len=max_len,
        pinned=False,
    )
    return Report(
        worker=worker,
        device="cpu",
        incarnation=1,
        epoch=1,
        slab_bytes=1,
        num_slabs=1,
        num_free_slabs=1,
        models=[model],
    )


async def test_requests_go_where_the_model_is_and_the_load_is_not(config: Config) -> None:
    async with running(config, Script()) as world:
        world.gateway.on_worker_up(place("w1"))
        world.gateway.on_routes(routes("w0", "w1", version=2))
        world.gateway.on_worker_message(place("w1"), report("w1", ModelState.ACTIVE, 50))
        world.gateway.on_worker_message(place("w0"), report("w0", ModelState.COLD, 0))
        await world.chat()
        assert world.links.sent[-1][0] == place("w1")
        world.gateway.on_worker_message(place("w0"), report("w0", ModelState.ACTIVE, 0))
        await world.chat()
        assert world.links.sent[-1][0] == place("w0")
        world.gateway.on_worker_message(place("w1"), report("w1", ModelState.ACTIVE, 0))
        where = set()
        for _ in range(4):
            await world.chat()
            where.add(world.links.sent[-1][0])
        assert len(where) == 1  # the same beginning goes to the same prefix cache
