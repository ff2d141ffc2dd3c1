"""Commands whose options come in groups: a dataclass for each, whose fields are the options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from inspect import Parameter, Signature, signature
from typing import Any


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: behind its own options those of its groups.

    A parameter of the command whose type is a dataclass is a group, and is given an instance.
    """
    given = signature(command, eval_str=True).parameters.values()
    groups = {each.name: each.annotation for each in given if _is_group(each.annotation)}
    fields = {name: signature(group, eval_str=True).parameters for name, group in groups.items()}

    def run(**options: Any) -> None:
        made = {
            name: group(**{each: options.pop(each) for each in fields[name]})
            for name, group in groups.items()
        }
        command(**made, **options)

    own = [each for each in given if each.name not in groups]
    together = [*own, *(each for group in fields.values() for each in group.values())]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {each.name: each.annotation for each in together}
    run.__signature__ = Signature(  # type: ignore[attr-defined]  # what typer reads
        [each.replace(kind=Parameter.KEYWORD_ONLY) for each in together]
    )
    return run


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and is_dataclass(annotation)
