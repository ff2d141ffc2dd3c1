"""The admin endpoints: what they show, pass on and refuse."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from prism.controller.admin import LimitsBody, build_app
from prism.controller.decisions import Plan
from prism.controller.migration import Migration, Phase
from prism.controller.silence import Silence
from prism.controller.snapshot import Home
from prism.controller.state import ControllerState
from prism.errors import Conflict, EngineFailure, RequestError, Unavailable
from prism.messages import TenantReport
from prism.types import ModelId, ModelState, WorkerId
from tests.controller.reports import model_report, report


class FakeService:
    """Keeps what it was asked for."""

    def __init__(self) -> None:
        homes = {
            ModelId("a"): (Home(WorkerId("worker-0")),),
            ModelId("org/b"): (Home(WorkerId("worker-1")), Home(WorkerId("worker-0"))),
        }
        self.state = ControllerState(epoch=7, homes=homes)
        self.asked: list[tuple[Any, ...]] = []
        self.error: RequestError | None = None
        self.plan: Plan | None = None
        self.without_room: list[str] = []
        self.silence = Silence({})

    async def load(self, model: str, pinned: bool | None = None) -> list[str]:
        self._ask("load", model, pinned)
        return self.without_room

    async def unload(self, model: str) -> None:
        self._ask("unload", model)

    async def move(self, model: str, device: int) -> WorkerId:
        self._ask("move", model, device)
        return WorkerId(f"worker-{device}")

    async def set_limits(self, model: str, floor: int, limit: int | None) -> list[str]:
        self._ask("limits", model, floor, limit)
        return self.without_room

    def _ask(self, *asked: Any) -> None:
        self.asked.append(asked)
        if self.error is not None:
            raise self.error


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_app(service))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://prism") as client:
        yield client


def error_of(response: httpx.Response) -> tuple[int, str | None]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["param"]


@pytest.mark.anyio
async def test_models_with_and_without_a_worker(client: httpx.AsyncClient, service: FakeService) -> None:
    state = model_report("a", state=ModelState.ACTIVE, weights_bytes=5, error=None)
    service.state.on_report(report("worker-0", state, incarnation=2, num_free_slabs=6))
    answer = (await client.get("/admin/models")).json()
    assert answer["epoch"] == 7
    assert answer["devices"] == [
        {
            "worker": "worker-0",
            "device": "cpu:0",
            "is_silent": False,
            "incarnation": 2,
            "slab_bytes": 2**21,
            "num_slabs": 8,
            "num_free_slabs": 6,
            "registered_bytes": 0,
            "registration_error": None,
            "kv_host_bytes": 0,
            "kv_host_error": None,
        }
    ]
    first, second = answer["models"]
    assert first["model"] == "a" and first["report"]["state"] == "active"
    assert first["homes"] == ["worker-0"] and first["elsewhere"] == [] and first["migration"] is None
    assert second["model"] == "org/b" and second["worker"] == "worker-1" and second["report"] is None
    assert second["homes"] == ["worker-1", "worker-0"]
    assert second["elsewhere"] == [{"worker": "worker-0", "report": None}]


@pytest.mark.anyio
async def test_tenants_are_added_up_over_devices(client: httpx.AsyncClient, service: FakeService) -> None:
    assert (await client.get("/admin/models")).json()["tenants"] == []
    counts = {"num_running": 1, "num_waiting": 2, "prompt_tokens": 30, "decoded_tokens": 4}
    for worker, seconds in (("worker-0", 0.5), ("worker-1", 0.25)):
        tenants = [TenantReport(tenant=n, weight=2, device_seconds=seconds, **counts) for n in ("x", "y")]
        service.state.on_report(report(worker, tenants=tenants))
    both = {name: 2 * count for name, count in counts.items()} | {"weight": 2.0, "device_seconds": 0.75}
    answer = (await client.get("/admin/models")).json()["tenants"]
    assert answer == [{"tenant": "x"} | both, {"tenant": "y"} | both]


@pytest.mark.anyio
async def test_a_migration_under_way_is_shown(client: httpx.AsyncClient, service: FakeService) -> None:
    moving = Migration(ModelId("a"), WorkerId("worker-0"), WorkerId("worker-1"), Phase.LOADING, 0.0)
    service.state.migrations[ModelId("a")] = moving
    first, _ = (await client.get("/admin/models")).json()["models"]
    assert first["migration"] == {"source": "worker-0", "target": "worker-1", "phase": "loading"}
    assert [place["worker"] for place in first["elsewhere"]] == ["worker-1"]


@pytest.mark.anyio
async def test_what_placement_has_found_is_shown(client: httpx.AsyncClient, service: FakeService) -> None:
    empty = {"pressures": {}, "crowded": [], "infeasible": [], "shut_out": []}
    assert (await client.get("/admin/models")).json()["placement"] == empty
    pressures = {WorkerId("worker-0"): 0.51234}
    crowded, infeasible, shut_out = (frozenset((ModelId(name),)) for name in ("a", "org/b", "c"))
    service.plan = Plan((), {}, crowded, infeasible, shut_out, pressures)
    found = (await client.get("/admin/models")).json()["placement"]
    assert found.pop("pressures") == {"worker-0": 0.512}
    assert found == {"crowded": ["a"], "infeasible": ["org/b"], "shut_out": ["c"]}


@pytest.mark.anyio
async def test_commands_are_passed_on(client: httpx.AsyncClient, service: FakeService) -> None:
    for path, body in (
        ("a/load", None),
        ("org/b/load", {"pinned": True}),
        ("a/unload", None),
        ("a/limits", {"kv_floor_bytes": 5, "kv_limit_bytes": 9}),
        ("a/limits", {}),
        ("org/b/move", {"device": 0}),
    ):
        response = await client.post(f"/admin/models/{path}", json=body)
        assert response.status_code == 200, response.text
    assert service.asked == [
        ("load", "a", None),
        ("load", "org/b", True),
        ("unload", "a"),
        ("limits", "a", 5, 9),
        ("limits", "a", 0, None),
        ("move", "org/b", 0),
    ]
    assert (await client.get("/health")).json() == {"status": "ok"}


@pytest.mark.anyio
async def test_answers_name_the_models_without_room(client: httpx.AsyncClient, service: FakeService) -> None:
    service.without_room = ["org/b"]
    for path, body in (("a/load", {"pinned": True}), ("a/limits", {"kv_floor_bytes": 5})):
        response = await client.post(f"/admin/models/{path}", json=body)
        assert response.json()["without_room"] == ["org/b"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("nope/load", None, 404, "model"),
        ("nope/unload", None, 404, "model"),
        ("nope/limits", {}, 404, "model"),
        ("a/load", {"pin": True}, 400, "pin"),
        ("a/load", {"pinned": "maybe"}, 400, "pinned"),
        ("a/limits", {"kv_floor_bytes": -1}, 400, "kv_floor_bytes"),
        ("a/limits", {"kv_limit_bytes": 0}, 400, "kv_limit_bytes"),
        ("a/limits", {"kv_limit_bytes": "much"}, 400, "kv_limit_bytes"),
        ("a/limits", {"kv_floor_bytes": 2, "kv_limit_bytes": 1}, 400, None),
        ("a/limits", None, 400, None),
        ("a/limits", {"kv_limit_bytes": True}, 400, "kv_limit_bytes"),
        ("a/limits", {"kv_limit_bytes": "4096"}, 400, "kv_limit_bytes"),
        ("a/limits", {"kv_floor_bytes": 10**26}, 400, "kv_floor_bytes"),
        ("a/load", {"pinned": 1}, 400, "pinned"),
        ("a/unload", {"now": True}, 400, "now"),
        ("a/frob", None, 404, None),
        ("nope/move", {"device": 0}, 404, "model"),
        ("a/move", {}, 400, "device"),
        ("a/move", {"device": "0"}, 400, "device"),
        ("a/move", {"device": -1}, 400, "device"),
    ],
)
async def test_refusals(
    path: str, body: Any, status: int, param: str | None, client: httpx.AsyncClient, service: FakeService
) -> None:
    response = await client.post(f"/admin/models/{path}", json=body)
    assert error_of(response) == (status, param)
    assert service.asked == []


@pytest.mark.anyio
@pytest.mark.parametrize("body", [b"{", b'"\xff"', b"", b"[]"])
async def test_bodies_that_are_no_objects(body: bytes, client: httpx.AsyncClient) -> None:
    """Some were refused in the framework's own shape, or with a number of bytes as their `param`."""
    headers = {"content-type": "application/json"}
    response = await client.post("/admin/models/a/limits", content=body, headers=headers)
    assert error_of(response) == (400, None)


@pytest.mark.anyio
async def test_errors_of_the_worker_have_their_status(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.error = EngineFailure("no such tensor")
    response = await client.post("/admin/models/a/load")
    assert error_of(response) == (500, None) and "no such tensor" in response.text
    service.error = Conflict("model a has unfinished requests", param="model")
    response = await client.post("/admin/models/a/unload")
    assert error_of(response) == (409, "model") and "unfinished" in response.text
    service.error = Unavailable("worker-0, where a lives, is not up", retry_after=1.0)
    response = await client.post("/admin/models/a/load")
    assert error_of(response) == (503, None) and response.headers["retry-after"] == "1"


def test_a_floor_past_its_limit_is_refused() -> None:
    """A worker would have taken more for the floor than the limit allows."""
    with pytest.raises(ValidationError, match="kv_floor_bytes is larger than kv_limit_bytes"):
        LimitsBody(kv_floor_bytes=2, kv_limit_bytes=1)
    assert LimitsBody(kv_floor_bytes=2).kv_limit_bytes is None
