"""A run's configuration from a preset, YAML and the command line.

`--section.field value` and the same keys in YAML end in `dmoe.config.overrides`. tyro renders `--help` from the
dataclasses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmoe.config import RunConfig
from dmoe.config.overrides import apply_overrides, field_names, merge, nearest, read_yaml
from dmoe.errors import ConfigError
from dmoe.models.presets import PRESETS, get_preset


def parse_overrides(args: list[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value` as a nested dict; `-` and `_` are the same in names."""
    overrides: dict[str, Any] = {}
    rest = list(args)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument {flag!r}: options look like --section.field value")
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if name not in field_names(RunConfig):
            raise ConfigError(f"unknown option --{name}{nearest(name, field_names(RunConfig))}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"option --{name} needs a value (one that begins with -- goes after an = sign)")
            value = rest.pop(0)
        *sections, field = name.split(".")
        place = overrides
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return overrides


def build_config(source: str | None, args: list[str]) -> RunConfig:
    """The run's configuration: preset, then YAML, then command line.

    Args:
        source: a preset's name, a path ending in .yaml or .yml, or None for the defaults.
        args: the command line after it.
    """
    from_file: dict[str, Any] = {}
    if source is not None and Path(source).suffix in (".yaml", ".yml"):
        from_file = read_yaml(Path(source))
    elif source is not None:
        get_preset(source)
        from_file = {"preset": source}
    overrides = merge(from_file, parse_overrides(args))
    preset = get_preset(str(overrides.get("preset", RunConfig().preset)))
    return apply_overrides(RunConfig(model=preset), overrides)


def print_config_help(prog: str, description: str) -> None:
    """All fields with types, defaults and docs, rendered by tyro."""
    import tyro

    tyro.cli(
        RunConfig,
        prog=prog,
        description=f"{description}\n\nPresets: {', '.join(PRESETS)}",
        args=["--help"],
        default=RunConfig(model=get_preset(RunConfig().preset)),
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )
