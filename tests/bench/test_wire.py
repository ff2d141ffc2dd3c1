"""Prompts have exactly the wanted length, and requests say what they should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prism.bench.prompts import Texts, TokenIds, load_texts
from prism.bench.targets import Objectives, Target
from prism.bench.wire import Style, encode_all
from prism.bench.workload import Planned
from prism.demo.catalog import demo_model_path
from prism.errors import ConfigError
from tests.bench.records import target

WORDS = ["the", "old", "river", "runs", "over", "rolling", "stones", "and", "run", "under"]


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """A tokenizer whose tokens merge with their neighbours wherever they can."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    random = np.random.default_rng(0)
    text = [" ".join(random.choice(WORDS, 20)) for _ in range(200)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


@pytest.mark.parametrize("length", [1, 2, 17, 1000])
def test_texts_are_of_exactly_the_wanted_length(merging: Tokenizer, length: int) -> None:
    texts, random = Texts(merging, "test"), np.random.default_rng(1)
    made = [texts.make(length, random) for _ in range(20)]
    assert {len(merging.encode(text).ids) for text in made} == {length}
    assert length < 17 or len(set(made)) == 20


def test_what_a_tokenizer_adds_counts_as_prompt() -> None:
    path = demo_model_path("radio")  # begins every text with a token
    text = load_texts(path).make(9, np.random.default_rng(0))
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert len(tokenizer.encode(text).ids) == 9
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 8


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no tokenizer"):
        load_texts(tmp_path)


def test_token_ids() -> None:
    ids = TokenIds(10, 20).make(1000, np.random.default_rng(0))
    assert (len(ids), min(ids), max(ids)) == (1000, 10, 19)


def sent(to: Target, style: Style, seed: int = 0, index: int = 3) -> tuple[str, dict[str, Any]]:
    (request,) = encode_all([Planned(index, 0.0, to, 8, 4)], style, seed)
    head, _, body = request.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}" in head.decode().split("\r\n")
    return head.decode(), json.loads(body)


def test_a_completion() -> None:
    style = Style(temperature=0.0, headers={"x-a": "b"}, extra_body={"seed": 1})
    head, body = sent(target(), style)
    assert head.startswith("POST /v1/completions HTTP/1.1\r\nhost: h:80\r\n")
    assert "x-a: b" in head.split("\r\n")
    assert len(body.pop("prompt")) == 8
    assert body == {
        "model": "m",
        "max_tokens": 4,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 1,
    }


def test_objectives_are_told_if_so_wished() -> None:
    to = replace(target(), objectives=Objectives(ttft=0.0125, tpot=0.004))
    told = set(sent(to, Style(sends_slo=True))[0].split("\r\n"))
    assert {"x-slo-ttft-ms: 12.5", "x-slo-tpot-ms: 4"} <= told
    only = replace(to, objectives=Objectives(tpot=0.004))
    assert "x-slo-ttft-ms" not in sent(only, Style(sends_slo=True))[0]
    assert "x-slo" not in sent(to, Style())[0]


def test_a_chat() -> None:
    to = replace(target(), path="/v1/chat/completions", tokenizer=demo_model_path("adder"))
    _, body = sent(to, Style(ignore_eos=False))
    (message,) = body["messages"]
    assert message["role"] == "user" and len(message["content"]) == 8
    assert body["max_completion_tokens"] == 4
    assert "ignore_eos" not in body and "temperature" not in body


def test_a_chat_needs_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="which need --tokenizer"):
        sent(replace(target(), path="/v1/chat/completions"), Style())


def test_prompts_differ_and_can_be_had_again() -> None:
    first = sent(target(), Style())[1]["prompt"]
    assert sent(target(), Style())[1]["prompt"] == first
    assert sent(target(), Style(), seed=1)[1]["prompt"] != first
    assert sent(target(), Style(), index=4)[1]["prompt"] != first
