"""A server that runs with a profile, and the profile that it measured: `prism profile --from-server`."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from prism.cli.learn import fetch_counts
from prism.cli.main import main
from prism.errors import ConfigError
from prism.profile import read_profile
from tests.server.harness import DEMO, PLAIN, Server
from tests.support.waiting import wait_until
from tests.test_profile import RAW

pytestmark = pytest.mark.slow

NUM_TOKENS = 60


def ask(server: Server, model: str) -> None:
    body = {"model": model, "prompt": "12+34=", "max_tokens": NUM_TOKENS, "ignore_eos": True}
    with httpx.Client(**PLAIN, timeout=60) as client:
        client.post(f"{server.url}/v1/completions", json=body).raise_for_status()


def test_a_profile_is_learnt_and_other_models_have_none(tmp_path: Path) -> None:
    base, output = tmp_path / "base.json", tmp_path / "learnt.json"
    base.write_text(json.dumps(RAW | {"models": {"adder": RAW["models"]["small"]}}))
    models = {name: DEMO[name] for name in ("adder", "radio")}
    with Server(models, scheduling={"profile": str(base)}) as server:
        ask(server, "radio")
        ask(server, "adder")

        def seen() -> int:
            try:
                counts = fetch_counts(server.url).items()
            except ConfigError:
                return 0  # workers tell twice a second
            return sum(each.count for key, each in counts if (key.model, key.kind) == ("adder", "decode"))

        wait_until(lambda: seen() >= NUM_TOKENS - 1, "its steps are counted")
        assert {key.model for key in fetch_counts(server.url)} == {"adder"}
        with pytest.raises(SystemExit) as ended:
            main(["profile", "--from-server", server.url, "--profile", str(base), "--output", str(output)])
        assert not ended.value.code
    learnt, old = read_profile(output).models["adder"], read_profile(base).models["adder"]
    factors = {
        seconds / before
        for (_, seconds), (_, before) in zip(sorted(learnt.knots), sorted(old.knots), strict=True)
    }
    assert 0 < min(factors) == pytest.approx(max(factors)) and min(factors) != 1
    assert f"{NUM_TOKENS - 1} decode" in read_profile(output).note


def test_a_server_without_a_profile_is_refused() -> None:
    with Server({"adder": DEMO["adder"]}) as server:
        with pytest.raises(ConfigError, match="no model has run yet"):
            fetch_counts(server.url)
        ask(server, "adder")

        def reason() -> str:
            with pytest.raises(ConfigError) as refused:
                fetch_counts(server.url)
            return str(refused.value)

        wait_until(lambda: "its configuration has no scheduling.profile" in reason(), "its steps are counted")
