"""Opening a model whatever its format."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from dmoe.checkpoint.formats import dmoe_run, hf
from dmoe.checkpoint.formats.store import Source
from dmoe.config import ModelConfig
from dmoe.errors import ConfigError

KINDS = ("dmoe", "megablocks", "megatron", "hf")
"""Names of the formats, in the order in which a directory is tried."""


def format_module(kind: str) -> Any:
    """The module of a format other than ours and Hugging Face's: `is_one(path)`, `open(path, **hints)`,
    `write(source, folder, **options)`."""
    return importlib.import_module(f"dmoe.checkpoint.formats.{kind}")


def kind_of(path: Path | str) -> str:
    """Which format a directory (or file) has, one of KINDS. Raises ConfigError where it has none."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"source is {str(path)!r}: must be an existing directory")
    for kind in KINDS:
        if kind == "dmoe":
            found = dmoe_run.is_one(path)
        elif kind == "hf":
            found = hf.is_one(path)
        else:
            found = format_module(kind).is_one(path)
        if found:
            return kind
    raise ConfigError(
        f"source is {str(path)!r}: must be a Hugging Face directory (config.json), a run of dmoe train (config.yaml), "
        "one of its checkpoints (manifest.json), a Megatron checkpoint or a MegaBlocks one"
    )


def open_source(path: Path | str, kind: str | None = None, **hints: Any) -> Source:
    """A model in files, to be read tensor by tensor under our names.

    Args:
        kind: one of KINDS; None: found out.
        hints: what a format needs to be told; see its `open`.

    Raises:
        ConfigError: no format, or a model that we do not have.
        RunError: damaged files, or files that do not fit the configuration.
    """
    path = Path(path)
    kind = checked_kind(kind, "kind") if kind is not None else kind_of(path)
    if kind in ("dmoe", "hf") and hints:
        raise ConfigError(f"{', '.join(hints)} with source {str(path)!r}: must be left out for the format {kind}")
    if kind == "dmoe":
        return dmoe_run.RunSource(path)
    if kind == "hf":
        return hf.open_hf(path)
    return format_module(kind).open(path, **hints)


def read_config(path: Path | str, kind: str | None = None, **hints: Any) -> ModelConfig:
    """The configuration of a model in files; see `open_source`."""
    path = Path(path)
    kind = kind_of(path) if kind is None else kind
    if kind == "dmoe":
        return dmoe_run.read_run_config(path).model
    if kind == "hf":
        return hf.read_config(path)
    return open_source(path, kind, **hints).config


def checked_kind(kind: str, name: str) -> str:
    """`kind`. Raises ConfigError, about the option `name`, if it is not one of KINDS."""
    if kind not in KINDS:
        raise ConfigError(f"{name} is {kind!r}: must be one of {', '.join(KINDS)}")
    return kind
