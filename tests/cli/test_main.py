"""The verbs of the command line, as a user types them."""

from __future__ import annotations

import json
import platform
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from prism import __version__
from prism.cli.main import main

ROOT = Path(__file__).parents[2]


class Result:
    """How a command ended."""

    def __init__(self, status: object, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        captured = capsys.readouterr()
        return Result(caught.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def refusing() -> Iterator[str]:
    """An admin address that knows no model."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            name = unquote(self.path.removeprefix("/admin/models/").rpartition("/")[0])
            body = json.dumps({"error": {"message": f"model {name!r} does not exist"}}).encode()
            self.send_response(404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_all_mistakes_of_a_configuration_are_listed(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "prism.yaml"
    path.write_text("models: [{name: a, path: nowhere, colour: red}]\nserver: {port: 99999}")
    result = run("serve", str(path))
    assert result.status == 2
    lines = result.err.splitlines()
    assert "error: models[0].colour: unknown field" in lines
    assert any(line.startswith("error: server.port: ") for line in lines)
    assert result.out == ""


def test_a_configuration_that_is_not_there(run: Run) -> None:
    result = run("serve", "/nowhere.yaml")
    assert result.status == 2
    assert result.err.startswith("error: /nowhere.yaml: cannot be read: ")


def test_a_port_that_is_taken(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism.logs.setup", lambda *_: None)  # it would redirect the other tests' logs
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = tmp_path / "prism.yaml"
        path.write_text(
            f"models: [{{name: a, path: {ROOT}/prism/demo/models/adder}}]\nserver: {{port: {port}}}"
        )
        result = run("serve", str(path))
    assert result.status == 2
    assert result.err == f"error: server.port: cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize("verb", [("ps",), ("load", "x"), ("unload", "x"), ("move", "x", "1")])
def test_an_address_where_nobody_answers(run: Run, verb: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = run(*verb, "--admin", f"http://127.0.0.1:{port}")
    assert result.status == 1
    assert result.err.startswith(f"error: no answer from http://127.0.0.1:{port}: ")


def test_an_address_that_is_not_prisms(run: Run, refusing: str) -> None:
    result = run("ps", "--admin", refusing)
    assert (result.status, result.err) == (
        1,
        f"error: {refusing} is no Prism admin address (status 200)\n",
    )


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_what_the_server_refuses_is_told(run: Run, refusing: str, verb: str) -> None:
    result = run(verb, "x", "--admin", refusing)
    assert (result.status, result.out, result.err) == (1, "", "error: model 'x' does not exist\n")


def test_a_move_that_is_refused_is_told(run: Run, refusing: str) -> None:
    result = run("move", "x", "1", "--admin", refusing)
    assert (result.status, result.out, result.err) == (1, "", "error: model 'x' does not exist\n")
    assert run("move", "x", "one", "--admin", refusing).status == 2


@pytest.mark.parametrize("name", ["../x", "a/../b", "org/x", "a?b", "a#b", "ä b"])
def test_any_name_reaches_the_server(run: Run, refusing: str, name: str) -> None:
    """`..` became a part of the path, and the answer was only `status 404`."""
    assert run("load", name, "--admin", refusing).err == f"error: model {name!r} does not exist\n"


def test_the_address_may_come_from_the_environment(
    run: Run, refusing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRISM_ADMIN", refusing)
    assert run("unload", "x").err == "error: model 'x' does not exist\n"


def test_schema_is_the_one_of_the_examples(run: Run) -> None:
    result = run("schema")
    assert result.status == 0
    assert result.out == (ROOT / "examples/prism.schema.json").read_text()


def test_version(run: Run) -> None:
    assert run("version").out == f"{__version__}\n"


def test_help_names_every_verb(run: Run) -> None:
    text = run("--help").out
    verbs = (
        "serve",
        "demo",
        "ps",
        "load",
        "unload",
        "move",
        "bench",
        "profile",
        "doctor",
        "schema",
        "version",
    )
    for verb in verbs:
        assert verb in text


@pytest.mark.parametrize("system", ["Windows", "Darwin"])
def test_other_systems_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    result = run("version")
    assert (result.status, result.out, result.err) == (2, "", f"prism runs on Linux; this is {system}\n")
