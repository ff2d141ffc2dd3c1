"""The HTTP endpoints."""

from __future__ import annotations

import hmac
import logging
import re
import uuid
from typing import Any

from fastapi import Depends, FastAPI
from pydantic.json_schema import models_json_schema
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prism import __version__
from prism.config import ModelConfig, ServerConfig
from prism.errors import ModelNotFound, RequestError, Unauthorized
from prism.gateway.completions import complete
from prism.gateway.errors import (
    JsonResponse,
    on_bug,
    on_disconnect,
    on_http_exception,
    on_request_error,
)
from prism.gateway.schema_chat import ChatRequest
from prism.gateway.schema_completions import CompletionRequest
from prism.gateway.service import Gateway
from prism.types import ModelId

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(gateway: Gateway) -> ASGIApp:
    """The application of one gateway."""
    app = FastAPI(title="Prism", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_bug)
    _add_text(app, gateway)
    _add_models(app, gateway)
    _add_state(app, gateway)
    _add_schemas(app)
    return Envelope(app)


def _add_text(app: FastAPI, gateway: Gateway) -> None:
    guard = [Depends(KeyCheck(gateway.config.server))]

    @app.post("/v1/chat/completions", dependencies=guard, openapi_extra=_body(ChatRequest))
    async def chat(http: Request) -> Response:
        """Continue a conversation."""
        return await complete(gateway, http, ChatRequest)

    @app.post("/v1/completions", dependencies=guard, openapi_extra=_body(CompletionRequest))
    async def completions(http: Request) -> Response:
        """Continue text."""
        return await complete(gateway, http, CompletionRequest)


def _body(schema: type[ChatRequest] | type[CompletionRequest]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _add_schemas(app: FastAPI) -> None:
    """Bodies are parsed by `prepare`, not by FastAPI, so its /openapi.json must be told of their schemas."""
    document = app.openapi()
    _, schemas = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    guard = [Depends(KeyCheck(gateway.config.server))]
    created = int(gateway.clock.now())

    def entry(model: ModelConfig) -> dict[str, Any]:
        known = {"id": model.name, "object": "model", "created": created, "owned_by": "prism"}
        return known | {"max_model_len": gateway.max_len(ModelId(model.name))}

    @app.head("/v1/models", dependencies=guard, include_in_schema=False)
    @app.get("/v1/models", dependencies=guard)
    async def models() -> Response:
        """All configured models, loaded or not; `max_model_len` is vLLM's, and null until it is known."""
        return JsonResponse({"object": "list", "data": [entry(model) for model in gateway.config.models]})

    @app.get("/v1/models/{name:path}", dependencies=guard)
    async def model(name: str) -> Response:
        """One of them; names may contain slashes."""
        if (found := gateway.config.model(name)) is None:
            raise ModelNotFound(f"The model {name!r} does not exist", param="model")
        return JsonResponse(entry(found))


def _add_state(app: FastAPI, gateway: Gateway) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """200 once requests can be served."""
        body = {
            "status": gateway.status,
            "version": __version__,
            "workers": sorted(gateway.dispatcher.routing.workers),
            "silent_workers": gateway.dispatcher.routing.silent,
            "unavailable_models": gateway.unavailable_models,
        }
        return JsonResponse(body, 200 if gateway.is_ready else 503)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format, of all processes."""
        return Response(gateway.metrics.text(), media_type=_CONTENT_TYPE)


class KeyCheck:
    """Refuses requests without a known key, in a time that tells nothing about the keys.

    It leaves the key's tenant in the request's state, None if there are no keys.
    """

    def __init__(self, server: ServerConfig) -> None:
        self._keys = [each.key.encode() for each in server.api_keys]
        self._tenants = server.tenants

    async def __call__(self, http: Request) -> None:
        """Raises `Unauthorized`."""
        http.state.tenant = None
        if not self._keys:
            return
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        data = given.encode("latin-1").strip(b" \t")  # as text, the ends of UTF-8 would be white space too
        known = [hmac.compare_digest(data, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            raise Unauthorized("no valid API key; send it as Authorization: Bearer <key>")
        http.state.tenant = self._tenants[known.index(True)]


class Envelope:
    """Around everything: a request id, the client's own if it is a sane one, and a log of bugs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Request(scope).headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            log.exception("internal error", extra={"request_id": request_id, "path": scope["path"]})
