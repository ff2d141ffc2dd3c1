"""Requests as bytes, made before the run: encoding takes time that the sending of others needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from prism.bench.prompts import PromptMaker, TokenIds, load_texts
from prism.bench.targets import Address, Objectives, Target
from prism.bench.workload import Planned
from prism.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Style:
    """What all requests have in common."""

    ignore_eos: bool = True
    temperature: float | None = None
    """None leaves it to the server."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    sends_slo: bool = False
    """Each request tells the objectives by which it is judged."""
    token_ids: tuple[int, int] = (10, 250)
    """Range of the ids of prompts that need no tokenizer."""


def encode_all(planned: Sequence[Planned], style: Style, seed: int) -> list[bytes]:
    """The requests' heads and bodies, in order. Raises `ConfigError` for prompts that cannot be made."""
    makers: dict[Path | None, PromptMaker] = {}
    requests = []
    for request in planned:
        target = request.target
        if target.tokenizer not in makers:
            makers[target.tokenizer] = _maker(target, style)
        # by seed and place: another rate or another model beside it leaves a prompt as it is
        random = np.random.default_rng([seed, request.index])
        prompt = makers[target.tokenizer].make(request.prompt, random)
        requests.append(_request(target, _body(target, prompt, request.output, style), style))
    return requests


def _maker(target: Target, style: Style) -> PromptMaker:
    if target.tokenizer is not None:
        return load_texts(target.tokenizer)
    if target.is_chat:
        raise ConfigError([f"model {target.key}: {target.path} takes texts, which need --tokenizer"])
    return TokenIds(*style.token_ids)


def _body(target: Target, prompt: str | list[int], output: int, style: Style) -> bytes:
    body: dict[str, Any] = {"model": target.model}
    if target.is_chat:
        body["messages"] = [{"role": "user", "content": prompt}]
        body["max_completion_tokens"] = output
    else:
        body["prompt"] = prompt
        body["max_tokens"] = output
    if style.temperature is not None:
        body["temperature"] = style.temperature
    if style.ignore_eos:
        body["ignore_eos"] = True
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode(body | dict(style.extra_body))


def _request(target: Target, body: bytes, style: Style) -> bytes:
    headers = {
        "host": host_header(target.address),
        "content-type": "application/json",
        "accept": "text/event-stream",
        "content-length": str(len(body)),
    }
    if style.sends_slo:
        headers |= slo_headers(target.objectives)
    lines = [f"POST {target.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in (headers | dict(style.headers)).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def slo_headers(objectives: Objectives) -> dict[str, str]:
    """Those of the Gateway API's inference extension, in milliseconds."""
    values = {"x-slo-ttft-ms": objectives.ttft, "x-slo-tpot-ms": objectives.tpot}
    return {name: f"{1000 * value:g}" for name, value in values.items() if value is not None}


def host_header(address: Address) -> str:
    """With the port, and brackets around what has colons."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.port}"
