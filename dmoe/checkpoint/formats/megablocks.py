"""Checkpoints of models with MegaBlocks' layers, in and out. Two kinds of folders:

    OLMoE's own training ("olmo")          config.yaml with a section `model` of OLMo's options;
                                           model.safetensors (or its shards and index), or model.pt
    dMoE in a Llama-like model ("hf")      config.json; the same files. Names are Hugging Face's Llama names, but for
                                           the layers, whose tensors are below `model.layers.N.mlp.`

What is written has safetensors. In config.json, {"model_type": "megablocks", "layer": "dMoE", "model": {...}} has our
`ModelConfig`; a config.json of a Hugging Face family is read too. How `layer` stores experts: `megablocks_layers`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from dmoe.checkpoint.formats import megablocks_layers, megablocks_olmo
from dmoe.checkpoint.formats.extra_files import read_json
from dmoe.checkpoint.formats.mapped import MappedSource, stored_outlines, write_mapped
from dmoe.checkpoint.formats.mapping import Stored, same
from dmoe.checkpoint.formats.megablocks_layers import Layer, layer_mapping
from dmoe.checkpoint.formats.names import num_params, tensor_shapes
from dmoe.checkpoint.formats.publish import published
from dmoe.checkpoint.formats.safetensors_read import INDEX, SINGLE, read_header
from dmoe.checkpoint.formats.safetensors_write import DEFAULT_SHARD_SIZE, Outline
from dmoe.checkpoint.formats.store import Source
from dmoe.config import ModelConfig, require
from dmoe.errors import DmoeError, RunError

Names = Literal["hf", "olmo"]
MODEL_TYPE = "megablocks"
_YAML, _JSON = "config.yaml", "config.json"


def is_one(path: Path | str) -> bool:
    """Whether a folder is one of the two kinds, by its configuration and the names of its tensors."""
    path = Path(path)
    if megablocks_layers.weights(path) is None:
        return False
    if (path / _YAML).is_file():
        return megablocks_olmo.is_olmo(_read_yaml(path / _YAML))
    if not (path / _JSON).is_file():
        return False
    try:
        return read_json(path / _JSON).get("model_type") == MODEL_TYPE or any(
            name.endswith(".experts.mlp.w1") for name in _names(path)
        )
    except DmoeError:
        return False


def open(path: Path | str, *, config: ModelConfig | None = None) -> Source:
    """The model of a folder.

    Args:
        config: the model. None: by the folder's configuration.

    Raises:
        ConfigError: a model that our `Decoder` does not compute, or an output bias of experts that is not 0.
        RunError: files that are missing, damaged, or not those of the configuration.
    """
    path = Path(path)
    if (path / _YAML).is_file() and megablocks_olmo.is_olmo(options := _read_yaml(path / _YAML)):
        config = config or megablocks_olmo.to_config(options["model"])
        store = megablocks_layers.open_store(path, config.moe.num_experts)
        mapping = megablocks_olmo.mapping(config)
    else:
        config = config or _read_config(path)
        store = megablocks_layers.open_store(path, config.moe.num_experts)
        mapping = hf_mapping(config, "dMoE" if store.flat else "MoE")
    return MappedSource(store, mapping, config, ignored=megablocks_layers.zero_biases(store))


def write(
    source: Source,
    dst: Path | str,
    *,
    names: Names = "hf",
    layer: Layer = "dMoE",
    shard_size: int = DEFAULT_SHARD_SIZE,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder, an expert or another tensor at a time.

    Args:
        dst: absent or empty before; appears whole or not at all.
        names: "hf" or "olmo", the two kinds of folders.
        layer: the class that will load the experts: "dMoE", or "MoE" for plain experts. With "olmo" it is dMoE.
        shard_size: bytes, most of a file.
        dtype: of the weights. None: the source's.

    Raises:
        ConfigError: a model that cannot be expressed so; names the field.
        RunError: the disk refuses.
    """
    config = source.config
    require(names in ("hf", "olmo"), "names", names, "hf or olmo")
    require(layer in ("dMoE", "MoE"), "layer", layer, "dMoE or MoE")
    if names == "olmo":
        require(layer == "dMoE", "layer", layer, "dMoE with names olmo")
        options, mapping = megablocks_olmo.from_config(config), megablocks_olmo.mapping(config)
        settings = {_YAML: yaml.safe_dump({"model": options}, sort_keys=False)}
    else:
        megablocks_layers.check_expressible(config, layer)
        mapping = hf_mapping(config, layer)
        content = {"model_type": MODEL_TYPE, "layer": layer, "model": dataclasses.asdict(config)}
        settings = {_JSON: json.dumps(content, indent=2) + "\n"}
    outlines = {
        name: _on_disk(outline, layer, name) for name, outline in stored_outlines(source, mapping, dtype).items()
    }
    with published(Path(dst)) as folder:
        sink = megablocks_layers.Sink(folder, outlines, num_params=num_params(config), shard_size=shard_size)
        try:
            write_mapped(source, mapping, sink, dtype)
            sink.close()
        finally:
            sink.abandon()
        for name, text in settings.items():
            (folder / name).write_text(text, encoding="utf-8")


def hf_mapping(config: ModelConfig, layer: Layer) -> list[Stored]:
    """The tensors of a Llama-like model with MegaBlocks' layers."""
    mixtures = tuple(f"layers.{i}.mlp." for i in config.moe_layers())
    tensors: list[Stored] = []
    for name, shape in tensor_shapes(config).items():
        if not name.startswith(mixtures):
            tensors.append(same(name if name.startswith("lm_head.") else f"model.{name}", name, *shape))
    for prefix in mixtures:
        tensors.extend(layer_mapping(f"model.{prefix}", prefix, config.hidden_size, config.moe, layer))
    return tensors


def _on_disk(outline: Outline, layer: Layer, name: str) -> Outline:
    """dMoE's weights of all experts are rows of one matrix."""
    if layer == "MoE" or not name.endswith(megablocks_layers.STACKED):
        return outline
    E, F, D = outline.shape
    return Outline((E * F, D), outline.dtype)


def _names(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        return list(read_json(path / INDEX).get("weight_map", {}))
    if (path / SINGLE).is_file():
        return list(read_header(path / SINGLE))
    return list(megablocks_layers.open_store(path, 1).names())


def _read_config(path: Path) -> ModelConfig:
    content = read_json(path / _JSON)
    if content.get("model_type") != MODEL_TYPE:
        from dmoe.checkpoint.formats.families import family_of

        return family_of(content).to_config(content)
    from dmoe.config.overrides import apply_overrides

    fields = content.get("model")
    if not isinstance(fields, dict):
        raise RunError(f"{path / _JSON}: has no section model")
    return apply_overrides(ModelConfig(), fields, "model.")


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: is not YAML: {' '.join(str(error).split())[:200]}") from None
