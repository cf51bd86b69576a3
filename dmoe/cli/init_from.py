"""`--init-from DIR`: the model and the tokeniser of a run's configuration come from a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dmoe.config import ModelConfig, RunConfig, require
from dmoe.config.overrides import apply_overrides, field_names
from dmoe.errors import ConfigError


def start_from(folder: str, overrides: dict[str, Any]) -> RunConfig:
    """The configuration of a run that starts from `folder`: its model and tokeniser, with `overrides` over them.

    Raises:
        ConfigError: an option of `model` asks for weights of other shapes, or `data.tokenizer` is another one.
    """
    from dmoe.lora.base import base_config, base_tokenizer

    path = Path(folder).expanduser().resolve()  # the run may be continued from elsewhere
    base = base_config(path)
    model_options = overrides.get("model", {})
    _check_model(base, model_options, path)
    config = apply_overrides(_fitting(base), overrides)
    file, chosen = base_tokenizer(path), overrides.get("data", {}).get("tokenizer")
    if file is None:
        wanted = f"the path of a tokenizer.json, because {str(path)!r} has none"
        require(chosen is not None, "data.tokenizer", config.data.tokenizer, wanted)
    elif chosen is not None:
        same = _content(Path(str(chosen))) == _content(file)
        require(same, "data.tokenizer", chosen, f"left out with --init-from, which has {str(file)!r}")
    tokenizer = config.data.tokenizer if file is None else str(file)
    return replace(
        config,
        preset=path.name,
        data=replace(config.data, tokenizer=tokenizer),
        train=replace(config.train, init_from=str(path)),
    )


def _fitting(base: ModelConfig) -> RunConfig:
    """The defaults, with sequences that are not too long for the model, and until the folder's own takes its place a
    tokeniser that asks for no vocabulary."""
    default = RunConfig()
    train = replace(default.train, seq_len=min(default.train.seq_len, base.max_seq_len))
    return replace(default, model=base, train=train, data=replace(default.data, tokenizer="bytes"))


def _check_model(base: ModelConfig, options: dict[str, Any], path: Path) -> None:
    """Options that change the shape of no weight are allowed."""
    shapes = _shapes(base)
    for name in field_names(ModelConfig):
        *sections, leaf = name.split(".")
        given, was = options, base
        for section in sections:
            given, was = given.get(section, {}), getattr(was, section)
        if leaf not in given or not hasattr(was, leaf):
            continue
        alone: dict[str, Any] = {leaf: given[leaf]}
        for section in reversed(sections):
            alone = {section: alone}
        wanted = f"{getattr(was, leaf)!r} or left out, because of the weights in {str(path)!r}"
        try:
            fits = _shapes(apply_overrides(base, alone, "model.")) == shapes
        except ConfigError as error:  # a value that is none, or one that does not go with the others
            raise ConfigError(f"{error} (model.{name} with --init-from {path})") from None
        require(fits, f"model.{name}", given[leaf], wanted)


def _shapes(config: ModelConfig) -> dict[str, Any]:
    from dmoe.models import Decoder

    return {name: parameter.shape for name, parameter in Decoder.on_meta(config).named_parameters()}


def _content(file: Path) -> bytes | None:
    file = file / "tokenizer.json" if file.is_dir() else file
    return file.read_bytes() if file.exists() else None
