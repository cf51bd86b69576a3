"""Checks on fields, whose errors name the field, its value and a value that would be right."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dmoe.errors import ConfigError


def require(ok: bool, name: str, value: Any, wanted: str) -> None:
    """Raise `ConfigError` "`name` is `value`: must be `wanted`" unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}: must be {wanted}")


def require_positive(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value), f"{section}.{name}", value, "finite")
        require(value > 0, f"{section}.{name}", value, "greater than 0")


def require_not_negative(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value), f"{section}.{name}", value, "finite")
        require(value >= 0, f"{section}.{name}", value, "0 or greater")


def require_types(config: Any, section: str) -> None:
    """Check choices and integers of a config that was built in Python; the command line converts before."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        options = get_args(kind)
        literals = options if get_origin(kind) is Literal else [o for a in options for o in get_args(a)]
        if literals and not (value is None and type(None) in options):
            for item in value if get_origin(kind) is tuple else (value,):
                require(item in literals, f"{section}.{name}", value, f"one of {', '.join(map(str, literals))}")
        if kind is int:
            require(isinstance(value, int) and not isinstance(value, bool), f"{section}.{name}", value, "an integer")
