from __future__ import annotations

import socket
from pathlib import Path

import pytest

from prism.agent.main import listen, serve
from prism.config import Config
from prism.demo.catalog import demo_model_path
from prism.errors import ConfigError


def test_it_listens_at_once() -> None:
    with listen("127.0.0.1", 0, "server.port") as listener:
        socket.create_connection(listener.getsockname()).close()


def test_ipv6_addresses_are_told_by_their_colon() -> None:
    try:
        listener = listen("::1", 0, "server.port")
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    assert listener.family is socket.AF_INET6
    listener.close()


@pytest.mark.parametrize(("field", "name"), [("port", "server.port"), ("admin_port", "server.admin_port")])
def test_a_port_in_use_is_named_before_anything_is_made(
    field: str, name: str, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = {"port": 0, "admin_port": 0, field: taken.getsockname()[1]}
        models = [{"name": "adder", "path": str(demo_model_path("adder"))}]
        with pytest.raises(ConfigError, match=f"{name}: cannot listen on 127.0.0.1:"):
            serve(Config.model_validate({"models": models, "server": server}))
    assert list(short_path.iterdir()) == []


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ConfigError, match=r"server\.host"):
        listen("192.0.2.1", 0, "server.host")
