"""Whose a request is: API keys as they are configured, and the tenants that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from prism.fields import Real
from prism.types import Tenant, TenantId


class ApiKeyConfig(BaseModel):
    """An accepted bearer key, and whose it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = Field(min_length=1, repr=False)
    """A secret: it is shown nowhere."""

    @field_validator("key")
    @classmethod
    def _sendable(cls, key: str) -> str:
        if key != key.strip() or not key.isprintable():
            raise ValueError("has white space at its ends, or control characters: no header can hold it")
        return key

    tenant: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Shown in logs and metrics. Keys of one name are one tenant; without a name a key is one by itself."""
    weight: Real = Field(default=1.0, ge=0.001, le=1000)
    """Of the tenant's share of a device when several wait for it."""


def _with_fields(value: object) -> object:
    """A plain string is a key without a name."""
    if isinstance(value, dict | ApiKeyConfig):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a string, or a mapping with key, tenant and weight")
    if not value:
        raise ValueError("must not be empty")
    return {"key": value}


_Written = Annotated[str, Field(min_length=1)] | ApiKeyConfig
ApiKey = Annotated[ApiKeyConfig, BeforeValidator(_with_fields, json_schema_input_type=_Written)]


def tenant_name(key: ApiKeyConfig, index: int) -> TenantId:
    """The configured name, or one that tells the key's place and nothing of the key."""
    return TenantId(f"key-{index}" if key.tenant is None else key.tenant)


def tenants_of(keys: Sequence[ApiKeyConfig]) -> tuple[Tenant, ...]:
    """The tenant of each key."""
    names = [tenant_name(key, index) for index, key in enumerate(keys)]
    weights = {name: key.weight for name, key in zip(names, keys, strict=True)}
    total = sum(weights.values())
    return tuple(Tenant(name, weights[name], weights[name] / total) for name in names)


def key_problems(keys: Sequence[ApiKeyConfig]) -> list[str]:
    """What is wrong between keys, each with its place in the list."""
    problems = []
    places: dict[str, int] = {}
    tenants: dict[str, int] = {}
    unnamed = {tenant_name(key, index) for index, key in enumerate(keys) if key.tenant is None}
    for index, key in enumerate(keys):
        first = places.setdefault(key.key, index)
        if first != index:
            problems.append(f"[{index}].key: is the same as that of [{first}]")
        if key.tenant in unnamed:
            problems.append(f"[{index}].tenant: {key.tenant} is the name of a key without one")
            continue
        first = tenants.setdefault(tenant_name(key, index), index)
        if keys[first].weight != key.weight:
            weight = f"{key.weight:g}, but [{first}] of the same tenant has {keys[first].weight:g}"
            problems.append(f"[{index}].weight: is {weight}")
    return problems


def has_room(limit: int, num_all: int, num_own: int, part: float) -> bool:
    """Whether a queue takes one more.

    A full one does as long as the tenant has less than its part of it there, so that no flood keeps others
    out. So it holds little more than twice `limit` at most.
    """
    return num_all < limit or num_own < limit * part
