"""Calls of the admin endpoints."""

from __future__ import annotations

import sys
from typing import Any, NoReturn
from urllib.parse import quote

import httpx
import typer

LOAD_SECONDS = 150.0


def fetch_models(admin: str) -> dict[str, Any]:
    """What the server says of its devices and models."""
    return _call("GET", admin, "/admin/models")


def load_model(admin: str, name: str, pin: bool | None) -> None:
    """Load a model and wait for it, with its progress on a terminal."""
    from prism.cli.progress import show_progress

    with show_progress(admin, name):
        answer = _call("POST", admin, f"/admin/models/{_quoted(name)}/load", {"pinned": pin})
    typer.echo(f"{name} is active")
    if crowded_out := answer["without_room"]:
        typer.echo(f"pinned models leave no room for {', '.join(crowded_out)}", err=True)


def move_model(admin: str, name: str, device: int) -> None:
    """Move a model to another device; what the old one has, it finishes."""
    answer = _call("POST", admin, f"/admin/models/{_quoted(name)}/move", {"device": device})
    typer.echo(f"{name} lives on {answer['worker']}")


def unload_model(admin: str, name: str) -> None:
    """Evict a model."""
    _call("POST", admin, f"/admin/models/{_quoted(name)}/unload")
    typer.echo(f"{name} is unloaded")


def _quoted(name: str) -> str:
    """Whatever the name, it stays within its place in the path: `..` would leave it. Names have slashes."""
    return quote(name).replace(".", "%2E")


def _call(method: str, admin: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        response = httpx.request(
            method, admin.rstrip("/") + path, json=body, timeout=LOAD_SECONDS, trust_env=False
        )  # no proxy: the admin address is this machine's
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"no answer from {admin}: {error}")
    try:
        answer = response.json()
    except ValueError:
        fail(f"{admin} is no Prism admin address (status {response.status_code})")
    if response.status_code != 200:
        fail(answer.get("error", {}).get("message", f"status {response.status_code}"))
    return dict(answer)


def fail(message: str) -> NoReturn:
    """End the command: somebody else could not do it."""
    typer.echo(f"error: {message}", err=True)
    sys.exit(1)
