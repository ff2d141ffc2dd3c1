"""The trained demo models answer as well in fp8: packed by the agent, loaded, evicted, asked again."""

from __future__ import annotations

import httpx
import pytest

from tests.server.clients import ends, golden_calls
from tests.server.harness import DEMO, Server

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SLAB = 2 * 2**20


async def test_golden_answers(client: httpx.AsyncClient) -> None:
    with Server(DEMO, model={"quantization": "fp8"}, device={"memory": 5 * SLAB}) as server:
        for _ in range(2):
            for name in DEMO:
                calls = golden_calls(name, 10)
                answers = await ends([call.start(client, server.url) for call, _ in calls])
                assert [answer.text for answer in answers] == [text for _, text in calls]
        models = await server.models()
        assert sum(model["num_activations"] for model in models.values()) > len(DEMO)
        assert server.log.count("quantization fp8: weights are written out") == 1
