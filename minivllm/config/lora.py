"""Adapters named on the command line: how --lora-modules and --prompt-adapters are spelt. Nothing here loads one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import msgspec

from minivllm.exceptions import ConfigError


class AdapterPath(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One adapter: the name that requests give as their model, and where it lies."""

    name: str
    path: str
    base_model_name: str | None = None
    is_3d_lora_weight: bool = False


def read_lora_modules(values: Sequence[str] | None, served_names: Iterable[str] = ()) -> list[AdapterPath]:
    """Each value is name=path, or a JSON object of AdapterPath's fields. served_names: the model's own.

    Raises:
        ConfigError: a value is neither, or a name is used twice.
    """
    return _read("--lora-modules", values, served_names, takes_json=True)


def read_prompt_adapters(values: Sequence[str] | None, served_names: Iterable[str] = ()) -> list[AdapterPath]:
    """Each value is name=path.

    Raises:
        ConfigError: it is not, or a name is used twice.
    """
    return _read("--prompt-adapters", values, served_names, takes_json=False)


def _read(
    option: str, values: Sequence[str] | None, served_names: Iterable[str], *, takes_json: bool
) -> list[AdapterPath]:
    names = set(served_names)
    found = []
    for value in values or ():
        is_json = takes_json and value.lstrip().startswith("{")
        adapter = _read_json(option, value) if is_json else _read_pair(option, value)
        if not adapter.name or not adapter.path:
            raise ConfigError(f"{option} {value}: neither name nor path may be empty")
        if adapter.name in names:
            raise ConfigError(f"{option} {value}: the name {adapter.name} is used already; choose another")
        names.add(adapter.name)
        found.append(adapter)
    return found


def _read_pair(option: str, value: str) -> AdapterPath:
    name, equals, path = value.partition("=")
    if not equals:
        raise ConfigError(f"{option} {value}: write name=path")
    return AdapterPath(name.strip(), path.strip())


def _read_json(option: str, value: str) -> AdapterPath:
    try:
        return msgspec.convert(json.loads(value), AdapterPath)
    except ValueError as error:  # of JSON, or of its fields
        raise ConfigError(f"{option} {value}: {error}".replace("`", "")) from None
