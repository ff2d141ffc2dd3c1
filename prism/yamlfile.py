"""Reads YAML. What is wrong is told with its line, and never with its text: that may be a secret."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from prism.errors import ConfigError

_QUOTED = re.compile(r"""('(?:<[^']*>|\\?.)')|["'].*""", re.DOTALL)
"""In PyYAML's sentences: tokens like '<scalar>' and single characters; anything else is the file's."""
_WORD = re.compile(r"[a-z_]{1,24}")


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text that comes from `source`. Raises `ConfigError` with source, line and column.

    Keys may not repeat: YAML lets one silently win over the other.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        parts = [part for part in (error.context, error.problem) if part]
        problem = ": ".join(_QUOTED.sub(lambda found: found[1] or "'...'", part) for part in parts)
    except yaml.reader.ReaderError as error:
        place = f"line {text.count(chr(10), 0, error.position) + 1}: "
        problem = f"the character #x{ord(text[error.position]):04x} is not allowed"
    except RecursionError:
        place, problem = "", "nested too deeply, or in itself"
    raise ConfigError([f"{source}: not valid YAML: {place}{problem}"]) from None


class _StrictLoader(yaml.SafeLoader):
    """YAML without repeated keys; a value that Python cannot hold has its line."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                name = f"{key.value} " if _WORD.fullmatch(key.value) else ""
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name}is given twice", key.start_mark
                )
            seen.add(getattr(key, "value", None) if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError):  # 2026-13-01 is no date; !!bool x, !!timestamp x
            problem = "no value that can be held; put it in quotes if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
