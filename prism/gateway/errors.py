"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from prism.errors import RequestError, WireError


class JsonResponse(Response):
    """A JSON body, encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body's bytes."""
        return msgspec.json.encode(content)


def error_body(error: WireError) -> dict[str, Any]:
    """`{"error": {...}}`, in a response's body as in a stream's last event."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: WireError) -> JsonResponse:
    """The response to a request that failed before its first byte."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        headers["connection"] = "close"  # the rest of the body is not read
    return JsonResponse(error_body(error), error.status, headers)


async def on_request_error(_: Request, error: Exception) -> Response:
    """What Prism raises on purpose."""
    assert isinstance(error, RequestError)
    return error_response(error.wire())


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{error.detail}: {request.method} {request.url.path}"
    wire = WireError(status=error.status_code, type="invalid_request_error", message=message, code=code)
    response = error_response(wire)
    response.headers.update(error.headers or {})
    return response


async def on_disconnect(_: Request, __: Exception) -> Response:
    """The client left before its request was complete; nobody reads this."""
    return Response(status_code=499)


async def on_bug(_: Request, error: Exception) -> Response:
    """A bug of ours; the log has it."""
    return error_response(
        WireError(status=500, type="server_error", message="internal error", code="internal_error")
    )
