"""Admin endpoints, on an address of their own.

GET  /admin/models                    state and memory of all models (`prism ps`)
POST /admin/models/{name}/load        {"pinned": bool | null}
POST /admin/models/{name}/unload      409 while it has requests
POST /admin/models/{name}/move        {"device": int}; returns when new requests go there
POST /admin/models/{name}/limits      {"kv_floor_bytes": int, "kv_limit_bytes": int | null}
                                      load and limits answer with the models `without_room` beside pinned ones
GET  /health
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from prism.controller.decisions import Plan
from prism.controller.service import ControllerService
from prism.controller.state import ControllerState
from prism.errors import InvalidRequest, ModelNotFound, RequestError
from prism.types import ModelId, WorkerId


class _Body(BaseModel):
    """Types are not converted, unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class EmptyBody(_Body):
    """An unload has no options."""


_SUMMED = ("num_running", "num_waiting", "prompt_tokens", "decoded_tokens", "device_seconds")
NumBytes = Annotated[int, Field(ge=0, lt=2**63)]


class LoadBody(_Body):
    """Options of a load."""

    pinned: bool | None = None


class LimitsBody(_Body):
    """A model's KV limits in bytes."""

    kv_floor_bytes: NumBytes = 0
    kv_limit_bytes: Annotated[NumBytes, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> LimitsBody:
        if self.kv_limit_bytes is not None and self.kv_floor_bytes > self.kv_limit_bytes:
            raise ValueError("kv_floor_bytes is larger than kv_limit_bytes")
        return self


class MoveBody(_Body):
    """Where a model is to live."""

    device: Annotated[int, Field(ge=0, lt=2**31)]
    """Place in the configuration's `devices`."""


def build_app(service: ControllerService) -> FastAPI:
    """The admin application."""
    app = FastAPI(openapi_url=None)

    def known(name: str) -> ModelId:
        if ModelId(name) not in service.state.homes:
            raise ModelNotFound(f"model {name!r} does not exist", param="model")
        return ModelId(name)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/admin/models")
    async def models() -> dict[str, Any]:
        return describe(service)

    @app.post("/admin/models/{name:path}/load")
    async def load(name: str, body: Annotated[LoadBody | None, Body()] = None) -> dict[str, Any]:
        model = known(name)
        without_room = await service.load(model, body.pinned if body is not None else None)
        return {"model": model, "state": "active", "without_room": without_room}

    @app.post("/admin/models/{name:path}/unload")
    async def unload(name: str, _: Annotated[EmptyBody | None, Body()] = None) -> dict[str, Any]:
        model = known(name)
        await service.unload(model)
        return {"model": model, "state": "cold"}

    @app.post("/admin/models/{name:path}/move")
    async def move(name: str, body: MoveBody) -> dict[str, Any]:
        model = known(name)
        worker = await service.move(model, body.device)
        return {"model": model, "worker": worker}

    @app.post("/admin/models/{name:path}/limits")
    async def limits(name: str, body: LimitsBody) -> dict[str, Any]:
        model = known(name)
        without_room = await service.set_limits(model, body.kv_floor_bytes, body.kv_limit_bytes)
        return {"model": model, **body.model_dump(), "without_room": without_room}

    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    return app


async def _on_request_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _on_invalid(_: Request, error: Exception) -> JSONResponse:
    """The first problem of a body; of one that is no JSON the place is a number of bytes, and no field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(part for part in first["loc"][1:] if isinstance(part, str))
    return error_response(InvalidRequest(first["msg"].removeprefix("Value error, "), param=place or None))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Unknown paths and methods, and bodies that are no text."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{error.detail}: {request.method} {request.url.path}"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": body}, status_code=error.status_code, headers=error.headers)


def describe(service: ControllerService) -> dict[str, Any]:
    """Devices and models with their memory in bytes; `report` is null while a worker is away.

    Of a device that `is_silent` all is as it was when it reported last.
    """
    state = service.state
    devices = [
        {
            "worker": report.worker,
            "device": report.device,
            "is_silent": report.worker in service.silence.workers,
            "incarnation": report.incarnation,
            "slab_bytes": report.slab_bytes,
            "num_slabs": report.num_slabs,
            "num_free_slabs": report.num_free_slabs,
            "registered_bytes": report.registered_bytes,
            "registration_error": report.registration_error,
            "kv_host_bytes": report.kv_host_bytes,
            "kv_host_error": report.kv_host_error,
        }
        for report in state.reports.values()
    ]
    return {
        "epoch": state.epoch,
        "devices": devices,
        "models": [_describe_model(service.state, model) for model in state.homes],
        "placement": _describe_plan(service.plan),
        "tenants": _describe_tenants(state),
    }


def _describe_tenants(state: ControllerState) -> list[dict[str, Any]]:
    """What each has of all devices together."""
    tenants: dict[str, dict[str, Any]] = {}
    for report in state.reports.values():
        for tenant in report.tenants:
            values = dict(msgspec.to_builtins(tenant))
            total = tenants.setdefault(tenant.tenant, values)
            if total is not values:
                for name in _SUMMED:
                    total[name] += values[name]
    return list(tenants.values())


def _describe_plan(plan: Plan | None) -> dict[str, Any]:
    """The devices' pressures at the last look, and the models that have too little room."""
    if plan is None:
        return {"pressures": {}, "crowded": [], "infeasible": [], "shut_out": []}
    pressures = {worker: round(pressure, 3) for worker, pressure in plan.pressures.items()}
    return {
        "pressures": pressures,
        "crowded": sorted(plan.crowded),
        "infeasible": sorted(plan.infeasible),
        "shut_out": sorted(plan.shut_out),
    }


def _describe_model(state: ControllerState, model: ModelId) -> dict[str, Any]:
    """Its first home with `report`; other homes, and where it comes from or goes to, are in `elsewhere`."""
    home, *others = state.places(model)
    migration = state.migrations.get(model)
    return {
        "model": model,
        "worker": home,
        "report": _report(state, model, home),
        "homes": list(state.workers(model)),
        "elsewhere": [{"worker": worker, "report": _report(state, model, worker)} for worker in others],
        "migration": None
        if migration is None
        else {"source": migration.source, "target": migration.target, "phase": migration.phase.value},
    }


def _report(state: ControllerState, model: ModelId, worker: WorkerId) -> dict[str, Any] | None:
    report = state.report_of(worker, model)
    return None if report is None else dict(msgspec.to_builtins(report))


def error_response(error: RequestError) -> JSONResponse:
    """An error in OpenAI's shape."""
    headers = {} if error.retry_after is None else {"retry-after": str(max(1, round(error.retry_after)))}
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return JSONResponse({"error": body}, status_code=error.status, headers=headers)
