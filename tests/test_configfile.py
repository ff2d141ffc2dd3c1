from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prism.config import Config
from prism.configfile import config_schema, load_config, parse_config
from prism.errors import ConfigError
from prism.types import Tenant, TenantId

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path


def problems(text: str, folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, folder, {})
    return caught.value.problems


def test_annotated_example_shows_every_default() -> None:
    raw = yaml.safe_load((ROOT / "examples/prism.yaml").read_text())
    minimal = {"models": [{"name": raw["models"][0]["name"], "path": raw["models"][0]["path"]}]}
    assert Config.model_validate(raw) == Config.model_validate(minimal)
    assert set(raw) == set(Config.model_fields)
    for name, field in Config.model_fields.items():
        section = raw[name][0] if isinstance(raw[name], list) else raw[name]
        default = Config.model_validate(minimal).__getattribute__(name)
        shape = default[0] if isinstance(default, tuple) else default
        assert set(section) == set(type(shape).model_fields), field


def test_schema_file_is_current() -> None:
    assert (ROOT / "examples/prism.schema.json").read_text() == config_schema()


def test_every_problem_is_listed_at_once(folder: Path) -> None:
    """A variable that is not set, a path that is wrong or two equal names used to hide all others."""
    text = """
models:
  - {name: a, path: a, colour: red, slo: {ttft: 5 parsecs}}
  - {name: "bad name", path: b, memory: {floor: 2, limit: 1}}
  - {name: c, path: nowhere}
  - just text
devices: [{kind: tpu, slab: 3MiB}, {memory: 2MiB}]
server: {port: 99999, api_keys: ["", "${env.KEY}"]}
limits: {max_queue: "${env.QUEUE}"}
colour: red
"""
    assert sorted(problem.partition(": ")[0] for problem in problems(text, folder)) == [
        "colour",
        "devices[0].kind",
        "devices[0].slab",
        "devices[1].slab",
        "limits.max_queue",
        "models[0].colour",
        "models[0].slo.ttft",
        "models[1].memory.limit",
        "models[1].name",
        "models[2].path",
        "models[3]",
        "server.api_keys[0]",
        "server.api_keys[1]",
        "server.port",
    ]


def test_keys_and_their_tenants(folder: Path) -> None:
    text = """
models: [{name: a, path: a}]
server:
  api_keys:
    - first
    - {key: "${env.SECOND}", tenant: search, weight: 2}
    - {key: third, tenant: search, weight: 2}
    - {key: fourth}
"""
    config = parse_config(text, folder, {"SECOND": "second"})
    assert [key.key for key in config.server.api_keys] == ["first", "second", "third", "fourth"]
    search = Tenant(TenantId("search"), 2, 0.5)
    plain = [Tenant(TenantId(name), 1, 0.25) for name in ("key-0", "key-3")]
    assert config.server.tenants == (plain[0], search, search, plain[1])
    assert Config.model_validate_json(config.model_dump_json()) == config, "as every process reads it"
    assert "second" not in repr(config) and "first" not in repr(config)


def test_problems_of_keys_are_listed_at_once_and_show_no_key(folder: Path) -> None:
    text = """
models: [{name: a, path: a}]
server:
  port: 99999
  api_keys:
    - {key: "", tenant: "no spaces", weight: 0, colour: red}
    - {tenant: a}
    - 12345678
    - {key: "${env.NOT_SET}"}
"""
    assert sorted(problem.partition(": ")[0] for problem in problems(text, folder)) == [
        "server.api_keys[0].colour",
        "server.api_keys[0].key",
        "server.api_keys[0].tenant",
        "server.api_keys[0].weight",
        "server.api_keys[1].key",
        "server.api_keys[2]",
        "server.api_keys[3].key",
        "server.port",
    ]
    text = """
models: [{name: a, path: a}]
limits: {max_queue: 0}
server:
  api_keys:
    - sesame
    - {key: open, tenant: search, weight: 2}
    - {key: sesame, tenant: search}
    - {key: other, tenant: key-0}
"""
    found = problems(text, folder)
    assert sorted(found) == [
        "limits.max_queue: Input should be greater than or equal to 1",
        "server.api_keys[2].key: is the same as that of [0]",
        "server.api_keys[2].weight: is 1, but [1] of the same tenant has 2",
        "server.api_keys[3].tenant: key-0 is the name of a key without one",
    ]


def test_quantisation_that_nobody_knows_is_named(folder: Path) -> None:
    (problem,) = problems("models: [{name: a, path: a, quantization: int4}]", folder)
    assert problem.startswith("models[0].quantization: ") and "'none' or 'fp8'" in problem


def test_problems_of_whole_lists_are_listed_at_once(folder: Path) -> None:
    text = """
models: [{name: a, path: a}, {name: a, path: b}]
devices: [{kind: cuda}, {kind: cuda}]
"""
    assert problems(text, folder) == ["models: names used twice: a", "devices: GPUs used twice: 0"]


def test_models_must_fit_the_devices(folder: Path) -> None:
    """A floor beyond the memory was accepted, and left none to the other models."""
    text = """
models:
  - {name: a, path: a, device: 2}
  - {name: b, path: b, memory: {floor: 1GiB}}
  - {name: c, path: b, memory: {floor: 1GiB}, device: 0}
devices: [{memory: 512MiB}, {memory: 1GiB}]
"""
    assert problems(text, folder) == [
        "models[0].device: there are 2 devices",
        "models[2].memory.floor: is more than the memory of its device",
    ]


@pytest.mark.parametrize("path", ["'~nobody-of-this-name/x'", '"a\\0b"', "a" * 5000])
def test_impossible_paths(path: str, folder: Path) -> None:
    """Each of them was a traceback."""
    (problem,) = problems(f"models: [{{name: a, path: {path}}}]", folder)
    assert problem.startswith("models[0].path: ") and "cannot be read" in problem


@pytest.mark.parametrize("text", ["models: &a [*a]", "[" * 5000, "models: [{name: 2026-13-01}]"])
def test_yaml_that_python_cannot_hold(text: str, folder: Path) -> None:
    """Each of them was a traceback."""
    (problem,) = problems(text, folder)
    assert problem.startswith("<text>: not valid YAML")


SECRET = "sk-1234secret"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"server:\n  api_keys: [{SECRET}\nmodels: []", 3),
        (f"server:\n  api_keys:\n    - {SECRET}: : x", 3),
        (f"server:\n  api_keys:\n    - *{SECRET}", 3),
        (f"server:\n  api_keys:\n    - !{SECRET}'s x", 3),
        (f"server:\n  api_keys: [!!bool {SECRET}]", 2),
        (f"server:\n  api_keys: [!!timestamp {SECRET}]", 2),
        (f"server:\n  api_keys: ['{SECRET}]", 2),
        (f"server:\n  {SECRET}: 1\n  {SECRET}: 2", 3),
        (f"server: &{SECRET} a\nmodels: &{SECRET} b", 2),
        (f"server:\n  api_keys: [{SECRET}\0]", 2),
    ],
)
def test_yaml_errors_name_file_and_line_and_show_no_secret(text: str, line: int, tmp_path: Path) -> None:
    """They quoted the line, and two of them were a traceback."""
    path = tmp_path / "prism.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: not valid YAML: line {line}")
    assert "1234" not in problem and "secret" not in problem


def test_a_key_in_the_wrong_brackets_is_not_shown(folder: Path) -> None:
    """It was told as an unknown field."""
    found = problems(f"models: [{{name: a, path: a}}]\nserver: {{api_keys: [{{{SECRET}}}]}}", folder)
    assert "server.api_keys[0]: unknown field; known are key, tenant and weight" in found
    assert not any(SECRET in problem for problem in found)


def test_watchdogs_of_gpus_bite_by_themselves_and_none_at_once(folder: Path) -> None:
    (problem,) = problems("models: [{name: a, path: a}]\ndevices: [{watchdog_timeout: 9s}]", folder)
    assert problem == "devices[0].watchdog_timeout: must be at least 10s: reports may come late"
    another = {"kind": "cuda", "index": 1, "watchdog_timeout": 10}
    devices = [{}, {"kind": "cuda"}, {"watchdog_timeout": "5m"}, another]
    config = Config.model_validate({"models": [{"name": "a", "path": "a"}], "devices": devices})
    assert [device.watchdog_seconds for device in config.devices] == [math.inf, 60.0, 300.0, 10.0]


NUMBERS = [
    "models[0].max_model_len",
    "models[0].device",
    "models[0].expected_load",
    "devices[0].index",
    "devices[0].threads",
    "devices[0].max_batch_tokens",
    "devices[0].max_batch_size",
    "devices[0].speed",
    "devices[0].lanes",
    "server.port",
    "server.admin_port",
    "server.gateways",
    "server.api_keys[0].weight",
    "limits.max_queue",
    "scheduling.migration_gain",
    "scheduling.max_migrations",
]
QUANTITIES = [
    "models[0].slo.ttft",
    "models[0].slo.tpot",
    "models[0].memory.floor",
    "models[0].memory.limit",
    "devices[0].memory",
    "devices[0].slab",
    "devices[0].watchdog_timeout",
    "server.max_body",
    "server.shutdown_grace",
    "limits.max_wait",
    "limits.request_timeout",
    "limits.min_residency",
    "scheduling.quantum",
    "scheduling.idle_threshold",
    "scheduling.placement_interval",
    "scheduling.demand_window",
    "scheduling.migration_cooldown",
    "scheduling.drain_timeout",
    "host_memory.budget",
    "host_memory.registered",
    "host_memory.kv",
]


def test_the_lists_of_numbers_are_complete() -> None:
    """Whatever the schema calls a number is in one of them."""
    definitions = json.loads(config_schema())["$defs"]
    kinds = {
        (name, field)
        for name, section in definitions.items()
        for field, value in section.get("properties", {}).items()
        for each in value.get("anyOf", [value])
        if each.get("type") in ("integer", "number")
    }
    assert {field for _, field in kinds} == {name.rpartition(".")[2] for name in NUMBERS + QUANTITIES}
    assert len(kinds) == len(NUMBERS + QUANTITIES)


def with_value(field: str, value: object) -> str:
    """A configuration with one more field."""
    raw: dict[str, Any] = {"models": [{"name": "a", "path": "a"}]}
    *sections, last = re.split(r"\.", field)
    place: Any = raw
    for section in sections:
        name, is_list, _ = section.partition("[")
        fresh: Any = [{"key": "k"} if name == "api_keys" else {}] if is_list else {}
        place = place.setdefault(name, fresh)
        place = place[0] if is_list else place
    place[last] = value
    return yaml.safe_dump(raw)


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", ["2", True, "many", ".nan", [2]])
def test_numbers_are_strict(field: str, value: object, folder: Path) -> None:
    """A weight of "2" or `true` was one of 2 or 1."""
    (problem,) = problems(with_value(field, value), folder)
    assert problem.startswith(f"{field}: ")


@pytest.mark.parametrize("field", QUANTITIES)
@pytest.mark.parametrize("value", [True, "many", [2], -1, float("nan")])
def test_sizes_and_durations_are_strict(field: str, value: object, folder: Path) -> None:
    (problem,) = problems(with_value(field, value), folder)
    assert problem.startswith(f"{field}: ")


def test_a_number_may_come_from_the_environment(folder: Path) -> None:
    text = """
models: [{name: a, path: a, expected_load: "${env.LOAD}"}]
server: {port: "${env.PORT}", api_keys: [{key: "${env.KEY}", weight: "${env.LOAD}"}]}
"""
    config = parse_config(text, folder, {"PORT": "80", "LOAD": "0.5", "KEY": "123"})
    key = config.server.api_keys[0]
    assert (config.server.port, config.models[0].expected_load, key.weight, key.key) == (80, 0.5, 0.5, "123")
    with pytest.raises(ConfigError, match=r"server\.port: "):
        parse_config(text, folder, {"PORT": "80.5", "LOAD": "0.5", "KEY": "123"})
    (problem,) = problems("models: [{name: a, path: a}]\nserver: {port: '8${env.PATH}0'}", folder)
    assert problem.startswith("server.port: ")


def test_environment(folder: Path) -> None:
    text = "models: [{name: a, path: '${env.DIR}'}]"
    assert parse_config(text, folder, {"DIR": "b"}).models[0].path == str(folder / "b")
    assert problems(text, folder) == ["models[0].path: environment variable DIR is not set"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: [", "not valid YAML"),
        ("models: []", "models: Tuple should have at least 1 item"),
        ("3", "must hold a mapping"),
        ("models: [{name: a, path: nowhere}]", "holds no config.json"),
        ("models: [{name: a, path: a}, {name: a, path: b}]", "names used twice: a"),
        ("models: [{name: a, path: a}]\nmodels: []", "given twice"),
        ("models: [{name: a, path: a, memory: {floor: 2, limit: 1}}]", "floor is larger than limit"),
        (
            "models: [{name: a, path: a}]\ndevices: [{kind: cuda}, {kind: cuda}, {kind: cpu}, {kind: cpu}]",
            "GPUs used twice: 0",
        ),
    ],
)
def test_mistakes(text: str, expected: str, folder: Path) -> None:
    assert any(expected in problem for problem in problems(text, folder))


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Path("/nowhere.yaml"))


def test_placement_json_of_the_prototype(folder: Path) -> None:
    entries = [
        {
            "model_name": "a",
            "model_path": "a",
            "tokenizer_path": "a",
            "tp_size": 1,
            "init_placements": [{"gpu_ids": [1], "on": True, "max_memory_pool_size": 2}],
        },
        {"model_name": "b", "model_path": "b", "init_placements": [{"gpu_ids": [0], "on": False}]},
    ]
    config = parse_config(json.dumps(entries), folder, {})
    assert [(d.kind, d.index) for d in config.devices] == [("cuda", 0), ("cuda", 1)]
    assert [(m.preload, m.memory.limit) for m in config.models] == [(True, 2 * 10**9), (False, None)]
    assert [m.device for m in config.models] == [1, 0]


def test_placement_json_names_what_is_unsupported(folder: Path) -> None:
    entries = [
        {
            "model_name": "a",
            "model_path": "a",
            "tp_size": 2,
            "shape": 1,
            "init_placements": [{"gpu_ids": [0, 1]}],
        }
    ]
    found = problems(json.dumps(entries), folder)
    entries[0] |= {"tp_size": True, "init_placements": [{"gpu_ids": [True], "on": "no"}]}
    wrong = problems(json.dumps(entries), folder)
    for field in ("tp_size", "init_placements[0].gpu_ids", "init_placements[0].on"):
        assert any(problem.startswith(f"[0].{field}: ") for problem in wrong)
    entries[0]["init_placements"] = [{"gpu_ids": [0], "max_memory_pool_size": "2"}]
    assert "[0].init_placements[0].max_memory_pool_size: must be a number of GB" in problems(
        json.dumps(entries), folder
    )
    entries[0]["init_placements"] = {"gpu_ids": [0]}
    assert "[0].init_placements: must be a list" in problems(json.dumps(entries), folder)
    for field in ("[0].tp_size", "[0].shape", "[0].init_placements[0].gpu_ids"):
        assert any(problem.startswith(field) for problem in found)


def test_a_list_of_wrong_entries_is_not_called_empty_as_well(folder: Path) -> None:
    found = problems("models: [{name: 'a b', path: a}]", folder)
    assert len(found) == 1 and found[0].startswith("models[0].name")


def test_the_profiles_path_starts_at_the_files_folder(folder: Path) -> None:
    shipped = ROOT / "prism/sim/profiles/h100.json"
    (folder / "p.json").write_bytes(shipped.read_bytes())
    text = "models: [{name: a, path: a}]\nscheduling: {profile: p.json}"
    assert parse_config(text, folder, {}).scheduling.profile == str(folder / "p.json")


@pytest.mark.parametrize("path", ["nowhere.json", "a", "'~nobody-of-this-name/x'", '"a\\0b"'])
def test_a_profile_that_is_not_there(path: str, folder: Path) -> None:
    (problem,) = problems(f"models: [{{name: a, path: a}}]\nscheduling: {{profile: {path}}}", folder)
    assert problem.startswith("scheduling.profile: ")


@pytest.mark.parametrize("speed", ["0", "1.0e-320", "1.0e+308", ".nan", ".inf"])
def test_speeds_that_placement_could_not_compute_with(speed: str, folder: Path) -> None:
    """Each look at the devices ended the controller."""
    text = f"models: [{{name: a, path: a}}]\ndevices: [{{speed: {speed}}}]"
    (problem,) = problems(text, folder)
    assert problem.startswith("devices[0].speed: ")


def test_timeshare_pins_nothing(folder: Path) -> None:
    """It was accepted and had no effect."""
    text = "models: [{name: a, path: a, pinned: true}]\nscheduling: {mode: timeshare}"
    assert problems(text, folder) == ["models[0].pinned: mode timeshare keeps no model on a device"]


def test_static_shares_are_the_limits(folder: Path) -> None:
    """A limit was accepted and passed: the share took its place."""
    text = "models: [{name: a, path: a, memory: {limit: 1GiB}}]\nscheduling: {mode: static}"
    assert problems(text, folder) == [
        "models[0].memory.limit: mode static gives each model a part of its own"
    ]


@pytest.mark.parametrize("key", [" key", "key\n", "   ", "k\0y"])
def test_a_key_that_no_header_can_hold(key: str, folder: Path) -> None:
    """A secret's file ends with a line feed: nobody who sent the key was let in."""
    text = "models: [{name: a, path: a}]\nserver: {api_keys: ['${env.KEY}']}\n"
    with pytest.raises(ConfigError) as caught:
        parse_config(text, folder, {"KEY": key})
    (problem,) = caught.value.problems
    assert problem.startswith("server.api_keys[0].key: has white space")
