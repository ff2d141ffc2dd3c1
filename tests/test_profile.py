"""The profile file: what is written is read, and mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism.costs import from_shape
from prism.errors import ConfigError
from prism.profile import Profile, parse_profile, read_profile, write_profile

SHAPE = {
    "num_parameters": 1e9,
    "weight_bytes": 2_000_000_000,
    "read_bytes": 2_000_000_000,
    "kv_bytes_per_token": 32768,
    "num_layers": 16,
    "attention_width": 2048,
    "position_bytes": 256,
}
RAW: dict[str, Any] = {
    "version": 1,
    "device": {
        "name": "some",
        "memory_bytes": 80_000_000_000,
        "rates": {"flops": 7e14, "bandwidth": 3e12, "link": 5e10, "launch": 2e-5},
        "overlap": {"2": 1.2, "4": 1.6},
    },
    "models": {
        "small": {
            "shape": SHAPE,
            "knots": [[64, 0.0012], [1, 0.001]],
            "prompt_knots": [[512, 0.004], [16, 0.003]],
            "per_pair": 1e-12,
            "per_context": 1e-8,
            "load": {"fixed": 0.01, "bandwidth": 5e10},
        }
    },
}


def changed(path: str, value: object) -> bytes:
    raw = json.loads(json.dumps(RAW))
    place = raw
    *parents, last = path.split(".")
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(raw).encode()


@pytest.fixture
def profile() -> Profile:
    return parse_profile(json.dumps(RAW), "test")


def test_measured_costs_are_those_of_the_file(profile: Profile) -> None:
    costs = profile.costs("small")
    assert costs.steps.decode(1, 1000) == pytest.approx(0.001 + 1e-5)
    assert costs.activation == pytest.approx(0.01 + 2e9 / 5e10)
    assert costs.shape.num_layers == 16


def test_a_model_without_an_entry_costs_what_its_shape_tells(profile: Profile) -> None:
    shape = profile.costs("small").shape
    assert profile.costs("other", shape) == from_shape(shape, profile.device.rates.rates())
    with pytest.raises(ConfigError, match="other is not in the profile"):
        profile.costs("other")


def test_overlap_lies_between_what_was_measured(profile: Profile) -> None:
    assert [profile.together(n) for n in (1, 2, 3, 4, 8)] == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.6])


def test_written_and_read_back(profile: Profile, tmp_path: Path) -> None:
    write_profile(profile, tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == profile


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("device.rates.flops", -1, r"\$\.device\.rates\.flops"),
        ("device.rates.link", None, "link"),
        ("device.overlap", {"2": 0.5}, r"\$\.device\.overlap"),
        ("device.color", "green", "color"),
        ("models.small.knots", [[1, 0.1]], r"\$\.models\[\.\.\.\]\.knots"),
        ("models.small.knots", [[1, 0.1], [1, 0.2]], "models.small.knots"),
        ("models.small.load.fixed", "x", "load.fixed"),
        ("version", 2, "version must be 1"),
    ],
)
def test_mistakes_are_named(path: str, value: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_profile(changed(path, value), "test")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(tmp_path / "none.json")
