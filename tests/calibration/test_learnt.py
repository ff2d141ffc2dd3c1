"""A profile from what a server has measured: which factors, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prism.calibration.learnt import Counts, Key, Learnt, Seen, added, learn, read_counts
from prism.errors import ConfigError
from prism.profile import Profile, parse_profile
from tests.test_profile import RAW

SERVER = "http://server"


@pytest.fixture
def base() -> Profile:
    raw = json.loads(json.dumps(RAW)) | {"note": "measured once"}
    raw["models"]["large"] = json.loads(json.dumps(raw["models"]["small"]))
    raw["models"]["large"]["per_pair"] = 5e-12
    return parse_profile(json.dumps(raw), "test")


def counts(base: Profile, *works: tuple[str, str, int, float, float]) -> dict[Key, Seen]:
    return {
        Key(model, kind, base.costs(model).digest): Seen(count, seconds, predicted)
        for model, kind, count, seconds, predicted in works
    }


def learnt(base: Profile, given: Counts) -> Learnt:
    return learn(base, given, "base.json", SERVER, "since its start")


def origins(result: Learnt, model: str) -> dict[str, Any]:
    return {kind: (f.value, f.origin) for (name, kind), f in result.factors.items() if name == model}


def test_costs_are_scaled_by_what_was_measured(base: Profile) -> None:
    given = counts(
        base,
        ("small", "decode", 20, 3.0, 2.0),
        ("small", "prompt", 30, 1.0, 2.0),
        ("small", "load", 3, 4.0, 1.0),
        ("large", "decode", 100, 9.0, 9.0),
    )
    profile = learnt(base, given).profile
    old, new = base.models["small"], profile.models["small"]
    assert dict(new.knots) == pytest.approx({1: 0.0015, 64: 0.0018})
    assert dict(new.prompt_knots or ()) == pytest.approx({16: 0.0015, 512: 0.002})
    assert new.per_context == pytest.approx(1.5 * old.per_context)
    assert new.per_pair == pytest.approx(0.5 * old.per_pair)
    assert profile.costs("small").activation == pytest.approx(4 * base.costs("small").activation)
    assert dict(profile.models["large"].knots) == pytest.approx(dict(base.models["large"].knots))
    assert profile.device == base.device and new.shape == old.shape
    for part in ("base.json", SERVER, "since its start", "120 decode (1.09 times)", "Before: measured once"):
        assert part in profile.note


def test_too_few_of_a_models_own_count_with_all_others(base: Profile) -> None:
    given = counts(
        base,
        ("small", "decode", 19, 9.0, 1.0),
        ("large", "decode", 100, 11.0, 9.0),
        ("small", "prompt", 9, 9.0, 1.0),
        ("large", "prompt", 10, 9.0, 1.0),
        ("small", "load", 2, 3.0, 1.0),
        ("large", "load", 1, 1.0, 1.0),
    )
    result = learnt(base, given)
    assert origins(result, "small") == {"decode": (2.0, "all"), "prompt": (1.0, "none"), "load": (2.0, "all")}
    assert origins(result, "large")["decode"] == (pytest.approx(11 / 9), "model")


def test_what_is_learnt_can_be_learnt_from(base: Profile) -> None:
    """The server that is started with it measures against it."""
    first = learnt(base, counts(base, ("small", "decode", 20, 3.0, 2.0))).profile
    again = parse_profile(json.dumps(json.loads(json.dumps(_values(first)))), "again")
    assert again.costs("small").digest == first.costs("small").digest != base.costs("small").digest
    second = learnt(again, counts(first, ("small", "decode", 20, 3.0, 2.0))).profile
    assert second.models["small"].knots[0][1] == pytest.approx(1.5 * 1.5 * 0.001)


def _values(profile: Profile) -> Any:
    import msgspec

    return msgspec.to_builtins(profile, str_keys=True)


def test_another_profile_than_the_servers_is_refused(base: Profile) -> None:
    other = counts(base, ("small", "decode", 50, 3.0, 2.0), ("large", "decode", 50, 3.0, 2.0))
    strange = {
        Key(key.model, key.kind, "abc" if key.model == "small" else key.costs): other[key] for key in other
    }
    with pytest.raises(
        ConfigError, match=r"^base.json: has other costs of small than the profile of the server"
    ):
        learnt(base, strange)
    with pytest.raises(ConfigError, match=r"^base.json: has no model gone, which the server at"):
        learnt(base, other | {Key("gone", "decode", "abc"): Seen(50, 1.0, 1.0)})


def test_what_was_counted_by_an_earlier_profile_is_left_out(base: Profile) -> None:
    given = counts(base, ("small", "decode", 50, 3.0, 2.0))
    result = learnt(base, given | {Key("small", "decode", "abc"): Seen(50, 9.0, 1.0)})
    assert origins(result, "small")["decode"] == (1.5, "model")


def test_what_has_hardly_run_makes_no_profile(base: Profile) -> None:
    given = counts(base, ("small", "decode", 19, 1.0, 1.0), ("small", "load", 9, 1.0, 1.0))
    with pytest.raises(
        ConfigError, match=r"too little has run since its start \(19 decode, 0 prompt, 9 load\)"
    ):
        learnt(base, given)


def test_a_wild_factor_is_noted(base: Profile) -> None:
    given = counts(base, ("small", "decode", 50, 11.0, 2.0), ("large", "decode", 50, 3.0, 2.0))
    result = learnt(base, given)
    assert result.factors["small", "decode"].is_wild and not result.factors["large", "decode"].is_wild
    assert "Hardly to be believed: small decode." in result.profile.note
    slow = learnt(base, counts(base, ("small", "decode", 50, 0.39, 2.0)))
    assert slow.factors["small", "decode"].is_wild


def test_between_two_looks_what_was_added_counts(base: Profile) -> None:
    before = counts(base, ("small", "decode", 20, 40.0, 2.0))
    after = counts(base, ("small", "decode", 60, 46.0, 6.0), ("large", "prompt", 30, 1.0, 1.0))
    (small, large) = added(before, after, SERVER).values()
    assert (small, large) == (Seen(40, 6.0, 4.0), Seen(30, 1.0, 1.0))
    for later in ({}, counts(base, ("small", "decode", 19, 1.0, 1.0))):
        with pytest.raises(ConfigError, match="was started anew meanwhile"):
            added(before, later, SERVER)


ALONE = 'prism:work_alone_total{costs="abc",kind="decode",model_name="small"}'
STEPS = 'prism:steps_total{kind="decode",model_name="small"} 9.0\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STEPS, "its configuration has no scheduling.profile"),
        ('prism:models{state="active"} 0.0\n', "no model has run yet"),
        ("vllm:num_requests_running 1.0\n", "these are no metrics of Prism"),
        ("", "these are no metrics of Prism"),
        *(
            (f"{ALONE} {value}\n", f"prism:work_alone_total of small is {value}")
            for value in ("nan", "inf", "-1.0")
        ),
        ("<html><body>", "these are no metrics of Prism"),
        ('prism:work_alone_total{kind="decode"} 1', "these are no metrics of Prism"),
    ],
)
def test_metrics_without_what_is_needed_are_refused(text: str, message: str) -> None:
    """Without a profile predictions are from shapes: scaled by them, a measured base would be spoilt."""
    with pytest.raises(ConfigError, match=f"^{SERVER}: .*{message}"):
        read_counts(text, SERVER)
