"""No body, however odd, is answered by anything but OpenAI's answers and errors."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prism.config import Config
from prism.gateway.schema import NO_OPS
from prism.gateway.schema_chat import ChatRequest
from prism.gateway.schema_completions import CompletionRequest
from tests.gateway.fakes import MODEL, Script, make_config, running

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["user", "system", "assistant", "text", "content", "role", "type", MODEL])
)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "5", "\ud800"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *NO_OPS, "nonsense"})
BODIES = st.lists(
    st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3), min_size=5, max_size=20
)
VALID = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": MODEL, "prompt": "hi"},
}


async def _post_all(config: Config, bodies: list[dict[str, Any]]) -> None:
    async with running(config, Script("ab")) as world:
        for body in bodies:
            for path, valid in VALID.items():
                data = json.dumps(valid | body).encode()
                response = await world.client.post(path, content=data)
                assert response.status_code in (200, 400, 404), (body, response.text)
                if response.status_code != 200:
                    error = response.json()["error"]
                    assert set(error) == {"message", "type", "param", "code"}
                    _check_param(error["param"], body)


def _check_param(param: str | None, body: dict[str, Any]) -> None:
    """What is complained about is among what was sent."""
    if param is not None:
        first = re.split(r"[.\[]", param)[0]
        assert first in {*body, "model", "messages", "prompt", "max_tokens", "max_completion_tokens"}, param


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(BODIES)
def test_any_fields(model_dir: Path, bodies: list[dict[str, Any]]) -> None:
    asyncio.run(_post_all(make_config(model_dir), bodies))


@pytest.mark.anyio
async def test_the_openapi_document_is_whole(config: Config) -> None:
    async with running(config) as world:
        document = (await world.client.get("/openapi.json")).json()
        schemas = document["components"]["schemas"]
        for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
            assert name in schemas
        assert schemas["ChatRequest"]["additionalProperties"] is False
        assert set(VALID) <= set(document["paths"])
