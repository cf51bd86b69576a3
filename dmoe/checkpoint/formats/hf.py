"""Hugging Face directories: config.json and safetensors, read and written by the mapping of a family."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dmoe.checkpoint.formats import families
from dmoe.checkpoint.formats.extra_files import (
    CONFIG,
    TOKENIZER,
    copy_extra_files,
    original_config,
    read_json,
    write_json,
)
from dmoe.checkpoint.formats.mapped import MappedSource, stored_outlines, write_mapped
from dmoe.checkpoint.formats.mapping import Mapping
from dmoe.checkpoint.formats.names import HEAD, num_params
from dmoe.checkpoint.formats.safetensors_read import INDEX, SINGLE, SafetensorsStore
from dmoe.checkpoint.formats.safetensors_write import DEFAULT_SHARD_SIZE, SafetensorsSink
from dmoe.checkpoint.formats.store import Source
from dmoe.config import ModelConfig
from dmoe.errors import ConfigError

# In files of old versions of transformers: tables that are computed.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.masked_bias$")


def is_one(path: Path) -> bool:
    """Whether `path` is a Hugging Face directory."""
    return (path / CONFIG).is_file()


def read_config(path: Path) -> ModelConfig:
    """Our configuration of the model in a directory. Raises ConfigError for what we do not have."""
    hf = read_json(path / CONFIG)
    return _translated(path, hf)[1]


def _translated(path: Path, hf: dict[str, Any]) -> tuple[ModuleType, ModelConfig]:
    try:
        family = families.family_of(hf)
        return family, family.to_config(hf)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def open_hf(path: Path) -> MappedSource:
    """The model of a directory, in the names of its family or in those of transformers 5's memory (fused experts).

    Raises:
        ConfigError: a family or a feature that we do not have, or weights that are not safetensors.
        RunError: files that are damaged or do not fit config.json.
    """
    hf = read_json(path / CONFIG)
    family, config = _translated(path, hf)
    if not any((path / name).is_file() for name in (INDEX, SINGLE)):
        raise ConfigError(f"source is {str(path)!r}: must have {SINGLE} or {INDEX}; pickled weights are not read")
    store = SafetensorsStore(path)
    names = set(store.names())
    prefix = getattr(family, "PREFIX", {}).get(hf["model_type"], "")
    mapping = _nearest([_prefixed(family.mapping(config, fused), prefix) for fused in (False, True)], names)
    wanted = {stored.name for stored in mapping}
    patterns = [_COMPUTED, *map(re.compile, getattr(family, "IGNORED", ()))]
    ignored = {name for name in names - wanted if any(pattern.search(name) for pattern in patterns)}
    if config.tie_embeddings:
        ignored.add(HEAD)  # older files repeat a tied head, and nothing reads it
    return MappedSource(store, mapping, config, ignored=ignored)


def _prefixed(mapping: Mapping, prefix: str) -> Mapping:
    return [replace(stored, name=prefix + stored.name) for stored in mapping] if prefix else mapping


def _nearest(mappings: list[Mapping], names: set[str]) -> Mapping:
    return max(mappings, key=lambda mapping: sum(stored.name in names for stored in mapping))


def write_hf(
    source: Source,
    folder: Path,
    *,
    origin: Path | None = None,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    fused: bool = False,
    shard_size: int = DEFAULT_SHARD_SIZE,
) -> None:
    """Write a directory that transformers loads into `folder`, which exists.

    Args:
        origin: where `source` was opened; its config.json, of the same family, keeps what we have no field for.
        family: name of the family; None: that of `origin`, else the first that can express the model.
        fused: experts in the names of transformers 5's memory, all in one tensor.
        shard_size: bytes, most of a file.

    Raises:
        ConfigError: no family, or not this one, can express the model.
    """
    config = source.config
    original = original_config(origin) if origin is not None else None
    module = _family(config, original, family)
    hf = _config_json(module, config, original)
    mapping = module.mapping(config, fused)
    outlines = stored_outlines(source, mapping, dtype)
    sink = SafetensorsSink(folder, outlines, num_params=num_params(config), shard_size=shard_size)
    try:
        write_mapped(source, mapping, sink, dtype)
        sink.close()
    finally:
        sink.abandon()
    if origin is not None:
        copy_extra_files(origin, folder)
        _add_tokenizer(origin, folder, hf)
    kinds = Counter(outline.dtype for outline in outlines.values())
    name = str(kinds.most_common(1)[0][0]).removeprefix("torch.")
    hf["torch_dtype" if "torch_dtype" in hf and "dtype" not in hf else "dtype"] = name
    write_json(folder / CONFIG, hf)


def _family(config: ModelConfig, original: dict[str, Any] | None, name: str | None) -> ModuleType:
    known = {families.name(family): family for family in families.FAMILIES}
    if name is not None:
        if name not in known:
            raise ConfigError(f"--family is {name!r}: must be one of {', '.join(known)}")
        return known[name]
    if original is not None:
        try:
            family = families.family_of(original)
            if not family.misfits(config):
                return family
        except ConfigError:
            pass
    return families.family_for(config)


def _config_json(family: ModuleType, config: ModelConfig, original: dict[str, Any] | None) -> dict[str, Any]:
    """The original if it still describes the model, or with what changed, or a new one."""
    new: dict[str, Any] = family.from_config(config)

    def describes(hf: dict[str, Any]) -> bool:
        try:
            return bool(family.from_config(family.to_config(hf)) == new)
        except ConfigError:
            return False

    if original is not None and original.get("model_type") == new["model_type"]:
        merged = {**original, **{key: value for key, value in new.items() if value is not None or key not in original}}
        for hf in (dict(original), merged):
            if describes(hf):
                return hf
    return new


def _add_tokenizer(origin: Path, folder: Path, hf: dict[str, Any]) -> None:
    """For a model that was trained here: its tokeniser, in the form that transformers loads."""
    from dmoe.checkpoint.formats.extra_files import tokenizer_file
    from dmoe.data.tokenizer import JsonTokenizer

    ours = tokenizer_file(origin)
    if ours is None or (folder / TOKENIZER).exists():
        return
    content = ours.read_text(encoding="utf-8")
    try:
        tokenizer = JsonTokenizer(content, str(ours))
    except ConfigError:
        return  # bytes, which no library knows
    (folder / TOKENIZER).write_text(content, encoding="utf-8")
    special = json.loads(content)["added_tokens"]
    end = next(token["content"] for token in special if token["id"] == tokenizer.eos_id)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})
    hf["eos_token_id"] = tokenizer.eos_id
