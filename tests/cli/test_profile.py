"""`prism profile` as users type it: with a server that runs, and what is refused."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from prism.cli import learn
from prism.cli.main import main
from prism.demo.catalog import demo_model_path
from prism.profile import read_profile
from tests.test_profile import RAW

Run = Callable[..., tuple[object, str, str]]


class Metrics:
    """What a server tells, one text after the other; the last one again and again."""

    def __init__(self) -> None:
        self.url = ""
        self.texts: list[str] = []

    def tell(self, digest: str, **works: tuple[int, float, float]) -> None:
        """A look more at the counters of the model `small`: count, seconds, predicted by kind."""
        lines = ["# TYPE prism:work_alone_total counter"]
        for kind, figures in works.items():
            for name, value in zip(("", "_seconds", "_predicted_seconds"), figures, strict=True):
                labels = f'costs="{digest}",kind="{kind}",model_name="small"'
                lines.append(f"prism:work_alone{name}_total{{{labels}}} {float(value)}")
        self.texts.append("\n".join(lines) + "\n")


@pytest.fixture
def server() -> Iterator[Metrics]:
    metrics = Metrics()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = metrics.texts.pop(0) if len(metrics.texts) > 1 else (metrics.texts or [""])[0]
            self.send_response(200 if self.path == "/metrics" and text else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    metrics.url = f"http://127.0.0.1:{http.server_port}"
    yield metrics
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["profile", *map(str, arguments)])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.json"
    path.write_text(json.dumps(RAW))
    return path


@pytest.fixture
def digest(base: Path) -> str:
    return read_profile(base).costs("small").digest


def test_a_profile_is_learnt_from_a_server(
    run: Run, server: Metrics, base: Path, digest: str, tmp_path: Path
) -> None:
    server.tell(digest, decode=(100, 3.0, 2.0), prompt=(3, 9.0, 1.0), load=(4, 2.0, 4.0))
    output = tmp_path / "learnt.json"
    status, out, err = run("--from-server", f"{server.url}/", "--profile", base, "--output", output)
    assert (status, err) == (0, "")
    profile = read_profile(output)
    assert dict(profile.models["small"].knots) == pytest.approx({1: 0.0015, 64: 0.0018})
    assert dict(profile.models["small"].prompt_knots or ()) == pytest.approx({16: 0.003, 512: 0.004})
    assert profile.models["small"].load.bandwidth == pytest.approx(1e11)
    assert f"base.json as the server at {server.url}/ measured it since its start" in profile.note
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["MODEL", "WORK", "SEEN", "MEASURED", "PREDICTED", "FACTOR", "FROM"]
    assert lines[1] == ["small", "decode", "100", "3.000", "s", "2.000", "s", "1.500", "its", "own"]
    assert lines[2][-5:] == ["1.000", "unchanged", "(fewer", "than", "20)"]
    assert lines[3][7:] == ["0.500", "its", "own"]
    assert lines[4] == ["written", "to", str(output)]


def test_the_profile_is_the_configurations(
    run: Run, server: Metrics, base: Path, digest: str, tmp_path: Path
) -> None:
    config, output = tmp_path / "prism.yaml", tmp_path / "learnt.json"
    server.tell(digest, decode=(100, 3.0, 2.0))
    given = (config, "--from-server", server.url, "--output", output)
    config.write_text(f"models: [{{name: small, path: {demo_model_path('adder')}}}]")
    status, _, err = run(*given)
    assert (status, output.exists()) == (2, False) and "has no scheduling.profile" in err
    config.write_text(config.read_text() + "\nscheduling: {profile: base.json}")
    assert run(*given)[0] == 0
    assert read_profile(output).models["small"].knots[0] == (1, pytest.approx(0.0015))


def test_what_was_before_can_be_left_out(
    run: Run, server: Metrics, base: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tell(digest, decode=(100, 50.0, 2.0))
    server.tell(digest, decode=(140, 51.0, 3.0))
    slept = list[float]()
    monkeypatch.setattr(learn, "sleep", slept.append)
    output = tmp_path / "learnt.json"
    given = ("--from-server", server.url, "--profile", base, "--output", output)
    status, _, err = run(*given, "--seconds", "30")
    assert (status, slept, err) == (0, [30.0], "measuring for 30 s\n")
    profile = read_profile(output)
    assert profile.models["small"].knots[0] == (1, pytest.approx(0.001))
    assert "measured it in 30 s: 40 decode (1.00 times)" in profile.note


def test_a_wild_factor_is_told(run: Run, server: Metrics, base: Path, digest: str, tmp_path: Path) -> None:
    server.tell(digest, decode=(100, 12.0, 2.0))
    status, _, err = run("--from-server", server.url, "--profile", base, "--output", tmp_path / "o.json")
    assert status == 0 and err.startswith("WARNING: small, decode: 6 times the profile is beyond 0.2 to 5")


def test_another_profile_is_refused(run: Run, server: Metrics, base: Path, tmp_path: Path) -> None:
    server.tell("abc", decode=(100, 12.0, 2.0))
    output = tmp_path / "o.json"
    status, _, err = run("--from-server", server.url, "--profile", base, "--output", output)
    assert (status, output.exists()) == (2, False)
    assert err.startswith("error: base.json: has other costs of small than the profile of the server at ")


def test_nobody_answers(run: Run, base: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    status, _, err = run("--from-server", url, "--profile", base, "--output", tmp_path / "o.json")
    assert status == 1 and err.startswith(f"error: no answer from {url}: ")
    status, _, err = run("--from-server", "nonsense", "--profile", base, "--output", tmp_path / "o.json")
    assert status == 1 and err.startswith("error: no answer from nonsense: ")


def test_the_admin_address_has_no_metrics(run: Run, server: Metrics, base: Path, tmp_path: Path) -> None:
    status, _, err = run("--from-server", server.url, "--profile", base, "--output", tmp_path / "o.json")
    assert (status, err) == (1, f"error: {server.url} has no /metrics (status 404); server.port has them\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "a configuration is needed, or --from-server"),
        (("x.yaml", "--seconds", "3"), "--seconds: only with --from-server"),
        (("x.yaml", "--profile", "p.json"), "--profile: only with --from-server"),
        (("--from-server", "http://x"), "the server's profile is needed: --profile FILE, or its CONFIG"),
        (("x.yaml", "--from-server", "http://x", "--profile", "p.json"), "x.yaml names one"),
        (("--from-server", "http://x", "--device", "0"), "--device: a server counts its devices together"),
        (("--from-server", "http://x", "--seconds", "nan"), "'--seconds'"),
        (("--from-server", "http://x", "--profile", "/nowhere"), "/nowhere: cannot be read"),
    ],
)
def test_what_does_not_belong_together(run: Run, given: tuple[str, ...], message: str) -> None:
    status, _, err = run(*given)
    assert status == 2 and message in err


def test_the_servers_own_profile_is_not_written_over(run: Run, base: Path) -> None:
    """What is learnt the next time would be compared with another one than the server has."""
    status, _, err = run("--from-server", "http://x", "--profile", base, "--output", base)
    assert status == 2 and f"--output {base}: is the server's own profile" in err
    assert json.loads(base.read_text()) == RAW
