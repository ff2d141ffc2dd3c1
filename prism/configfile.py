"""Reads a configuration file: Prism's YAML, or the placement JSON of the published prototype.

All problems of a file are reported at once, each naming its field.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prism.config import Config
from prism.errors import ConfigError
from prism.fields import FromEnvironment
from prism.profile import read_profile
from prism.yamlfile import parse_yaml

_ENVIRONMENT = re.compile(r"\$\{env\.([A-Za-z_][A-Za-z0-9_]*)\}")


def load_config(path: Path, environment: Mapping[str, str] | None = None) -> Config:
    """The configuration in a file. Relative model paths start at the file's folder.

    Raises `ConfigError` with every problem found.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    return parse_config(text, path.parent, os.environ if environment is None else environment, str(path))


def parse_config(text: str, folder: Path, environment: Mapping[str, str], source: str = "<text>") -> Config:
    """The configuration in a text that comes from `source`; see `load_config`."""
    problems: list[str] = []
    try:
        raw = _expand(parse_yaml(text, source), environment, problems, "")
    except RecursionError:
        raise ConfigError([f"{source}: not valid YAML: nested in itself"]) from None
    if isinstance(raw, list):
        raw = _from_placement(raw, problems)
    if not isinstance(raw, dict):
        raise ConfigError(
            [*problems, f"{source}: must hold a mapping with `models:`, or a list of placements"]
        )
    raw = _with_profile(_with_paths(raw, folder, problems), folder, problems)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += _others(error, {_place(problem) for problem in problems})
    if problems:
        raise ConfigError(problems)
    return config


def _others(error: ValidationError, known: set[str]) -> list[str]:
    """What else is wrong. A list whose entries are wrong is not also too short."""
    items = error.errors()
    broken = {item["loc"][:1] for item in items if len(item["loc"]) > 1}
    sentences = [line for item in items if item["loc"] not in broken for line in _sentences(item)]
    return [sentence for sentence in sentences if _place(sentence) not in known]


def _place(problem: str) -> str:
    return problem.partition(": ")[0]


def _expand(value: Any, environment: Mapping[str, str], problems: list[str], place: str) -> Any:
    """Puts environment variables in place of `${env.NAME}` in all strings."""
    if isinstance(value, dict):
        return {k: _expand(v, environment, problems, f"{place}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, environment, problems, f"{place}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in environment:
            problems.append(f"{place}: environment variable {name} is not set")
        return environment.get(name, "")

    is_whole = _ENVIRONMENT.fullmatch(value) is not None
    return (FromEnvironment if is_whole else str)(_ENVIRONMENT.sub(replace, value))


def _sentences(error: Any) -> list[str]:
    """One, but of the whole configuration: each line of its error names its field itself.

    So does a line that begins with a place in a list.
    """
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return list(message.splitlines())
    place = ""
    for part in error["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}"
    if error["type"] == "extra_forbidden":
        message = "unknown field"
        if "api_keys" in error["loc"] and not str(part).isidentifier():  # `- {sk-...}`: a key, not a field
            place = place.removesuffix(f".{part}")
            message = "unknown field; known are key, tenant and weight"
    place = place.lstrip(".")
    return [place + (line if line.startswith("[") else f": {line}") for line in message.splitlines()]


def _with_paths(raw: dict[str, Any], folder: Path, problems: list[str]) -> dict[str, Any]:
    """The same with absolute model paths. Entries that are no models are left for pydantic to refuse."""
    models = raw.get("models")
    if not isinstance(models, list):
        return raw
    known = {_place(problem) for problem in problems}
    resolved = []
    for index, model in enumerate(models):
        place = f"models[{index}].path"
        if isinstance(model, dict) and isinstance(model.get("path"), str) and place not in known:
            model = model | {"path": _model_path(model["path"], folder, place, problems)}
        resolved.append(model)
    return raw | {"models": resolved}


def _with_profile(raw: dict[str, Any], folder: Path, problems: list[str]) -> dict[str, Any]:
    """The same with the profile's absolute path."""
    section = raw.get("scheduling")
    if not isinstance(section, dict) or not isinstance(section.get("profile"), str):
        return raw
    place, path = "scheduling.profile", section["profile"]
    if place in {_place(problem) for problem in problems}:
        return raw
    try:
        resolved = (folder / Path(path).expanduser()).resolve()
        if not resolved.is_file():
            problems.append(f"{place}: there is no file {resolved}")
            return raw
    except (OSError, ValueError, RuntimeError) as error:  # as of model paths
        problems.append(f"{place}: {path!r} cannot be read: {error}")
        return raw
    try:
        read_profile(resolved)
    except ConfigError as error:
        problems += [f"{place}: {problem}" for problem in error.problems]
    return raw | {"scheduling": section | {"profile": str(resolved)}}


def _model_path(path: str, folder: Path, place: str, problems: list[str]) -> str:
    try:
        resolved = (folder / Path(path).expanduser()).resolve()
        if not (resolved / "config.json").is_file():
            problems.append(f"{place}: {resolved} holds no config.json")
    except (OSError, ValueError, RuntimeError) as error:  # unreadable; with a null byte; of an unknown user
        problems.append(f"{place}: {path!r} cannot be read: {error}")
        return path
    return str(resolved)


# --- the prototype's placement files ---------------------------------------------------------------------

_PLACEMENT_FIELDS = {"model_name", "model_path", "tokenizer_path", "tp_size", "init_placements"}
_INSTANCE_FIELDS = {"gpu_ids", "on", "max_memory_pool_size"}


def _from_placement(entries: list[Any], problems: list[str]) -> dict[str, Any]:
    """A list of placements as Prism's own configuration; the pool size becomes the KV limit."""
    models = []
    devices: set[int] = set()
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.append(f"[{index}]: must be an object with model_name and model_path")
            continue
        models.append(_placed_model(entry, f"[{index}]", problems, devices))
    order = sorted(devices)
    for model in models:
        gpu = model.pop("gpu", None)
        model["device"] = None if gpu is None else order.index(gpu)
    kinds = [{"kind": "cuda", "index": index} for index in order]
    return {"models": models, **({"devices": kinds} if kinds else {})}


def _placed_model(
    entry: dict[str, Any], place: str, problems: list[str], devices: set[int]
) -> dict[str, Any]:
    problems += [f"{place}.{name}: unknown field" for name in sorted(set(entry) - _PLACEMENT_FIELDS)]
    model: dict[str, Any] = {"name": entry.get("model_name"), "path": entry.get("model_path")}
    problems += [
        f"{place}.{name}: is missing" for name in ("model_name", "model_path") if not entry.get(name)
    ]
    size = entry.get("tp_size", 1)
    if size != 1 or not _is_whole(size):
        problems.append(f"{place}.tp_size: tensor parallelism is not supported yet; only 1 is")
    if entry.get("tokenizer_path") not in (None, entry.get("model_path")):
        problems.append(f"{place}.tokenizer_path: must equal model_path")
    placements = entry.get("init_placements") or []
    if not isinstance(placements, list):
        problems.append(f"{place}.init_placements: must be a list")
        placements = []
    if len(placements) > 1:
        problems.append(f"{place}.init_placements: several instances of a model are not supported yet")
    for number, instance in enumerate(placements[:1]):
        _place_instance(instance, f"{place}.init_placements[{number}]", model, problems, devices)
    return model


def _place_instance(
    instance: Any, place: str, model: dict[str, Any], problems: list[str], devices: set[int]
) -> None:
    if not isinstance(instance, dict):
        problems.append(f"{place}: must be an object")
        return
    problems += [f"{place}.{name}: unknown field" for name in sorted(set(instance) - _INSTANCE_FIELDS)]
    gpus = instance.get("gpu_ids", [0])
    if not isinstance(gpus, list) or len(gpus) != 1 or not _is_whole(gpus[0]):
        problems.append(f"{place}.gpu_ids: must name exactly one device; several are not supported yet")
    else:
        devices.add(gpus[0])
        model["gpu"] = gpus[0]
    model["preload"] = instance.get("on", True)
    if not isinstance(model["preload"], bool):
        problems.append(f"{place}.on: must be true or false")
    size = instance.get("max_memory_pool_size")
    if isinstance(size, float) or _is_whole(size):
        model["memory"] = {"limit": f"{size}GB"}
    elif size is not None:
        problems.append(f"{place}.max_memory_pool_size: must be a number of GB")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def config_schema() -> str:
    """JSON schema of the YAML file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"
