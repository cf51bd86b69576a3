"""Values from a YAML file or the command line over a configuration: one set of names, types and checks for both.

A typo is answered with the nearest valid name; a value of another type with the field, the value and what it must be.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from dmoe.errors import ConfigError

Config = TypeVar("Config")


def field_names(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of every leaf field of a config dataclass."""
    names = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            names += field_names(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names + [prefix + name for name in _other_names(hints)]


def _other_names(hints: dict[str, Any]) -> list[str]:
    """Second names of fields, which a config takes when it is made and does not keep."""
    return [name for name, kind in hints.items() if isinstance(kind, dataclasses.InitVar)]


def nearest(name: str, valid: list[str]) -> str:
    """ " (did you mean X?)", or the empty string if nothing is near."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if not near:  # the field may be right and its section missing or wrong
        leaf = name.rpartition(".")[2]
        near = [v for v in valid if v.rpartition(".")[2] == leaf][:1]
    return f" (did you mean {near[0]}?)" if near else ""


def convert(name: str, value: Any, kind: Any) -> Any:
    """`value`, a string of the command line or a YAML scalar, as type `kind`.

    Raises:
        ConfigError: it is not one; names the field, the value and the type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):  # X | None
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return convert(name, value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if value in args:
            return value
        valid = [str(a) for a in args]
        raise ConfigError(f"{name} is {value!r}: must be one of {', '.join(valid)}{nearest(str(value), valid)}")
    if origin is tuple:
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        if args[-1] is Ellipsis and isinstance(items, (list, tuple)):
            args = args[:1] * len(items)
        if not isinstance(items, (list, tuple)) or len(items) != len(args):
            raise ConfigError(f"{name} is {value!r}: must be {len(args)} values, such as 0.9,0.95")
        return tuple(convert(name, item, arg) for item, arg in zip(items, args))
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise ConfigError(f"{name} is {value!r}: must be true or false")
    if kind is str:
        if isinstance(value, (dict, list)):
            raise ConfigError(f"{name} is {value!r}: must be one text")
        return "" if value is None else str(value)
    return _convert_number(name, value, kind)


def _convert_number(name: str, value: Any, kind: type) -> int | float:
    wrong = ConfigError(f"{name} is {value!r}: must be {'an integer' if kind is int else 'a number'}")
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        raise wrong
    try:
        number = float(value)
        if kind is float:
            return number
        if number != int(number):
            raise wrong
        # Not int(number) where there is a choice: a float would round a large integer.
        return int(value) if str(value).lstrip("+-").isdigit() else int(number)
    except (ValueError, OverflowError):
        raise wrong from None


def apply_overrides(config: Config, overrides: dict[str, Any], prefix: str = "") -> Config:
    """A copy of the dataclass `config` with nested `overrides` applied: {"train": {"steps": 10}}.

    All fields of a section change at once, so that checks between fields see only the final values.

    Raises:
        ConfigError: an unknown name (with the nearest valid one), a wrong type, or a failed check.
    """
    cls = type(config)
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(config)}.union(_other_names(hints))  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for key, value in overrides.items():
        name = prefix + str(key)
        if key not in known:
            valid = [prefix + n for n in field_names(cls)] + [prefix + k for k in known]
            raise ConfigError(f"unknown option {name}{nearest(name, valid)}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                first = field_names(typing.cast(type, kind))[0]
                raise ConfigError(f"{name} is {value!r}: must be a section with fields such as {name}.{first}")
            changes[key] = apply_overrides(getattr(config, key), value, name + ".")
        else:
            changes[key] = convert(name, value, kind.type if isinstance(kind, dataclasses.InitVar) else kind)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`base` with `extra` over it, section by section."""
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing or not a YAML mapping; names it (and the line).
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {str(path)!r}: must be UTF-8 text, but byte {error.start} is not") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        raise ConfigError(f"config file {str(path)!r}{where}: not valid YAML ({problem})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {str(path)!r}: must be a mapping of sections, not a {type(content).__name__}")
    return content
