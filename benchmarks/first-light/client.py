"""One streamed request, timed at the client."""

from __future__ import annotations

import json
import statistics
import time
from itertools import pairwise

import httpx


def prompt(length: int, seed: int) -> list[int]:
    """Token ids that differ from prompt to prompt."""
    return [(7919 * (seed + 1) + 104729 * i) % 128000 for i in range(length)]


async def stream(
    client: httpx.AsyncClient, model: str, length: int, tokens: int, seed: int
) -> dict[str, float]:
    """One greedy request; seconds to the first token, and the median and worst gap of the others.

    The official client is too slow for this: it takes 24 ms to encode a prompt of 3,000 token ids, and a
    burst of such prompts shows up as a gap in everybody's stream.
    """
    body = {
        "model": model,
        "prompt": prompt(length, seed),
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    content = json.dumps(body).encode()
    times = []
    begin = time.perf_counter()
    async with client.stream("POST", "/v1/completions", content=content, timeout=300) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    gaps = [b - a for a, b in pairwise(times)]
    return {"ttft": times[0] - begin, "gap": statistics.median(gaps or [0.0]), "worst": max(gaps or [0.0])}
