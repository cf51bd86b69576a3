"""Tensors of MegaBlocks' layers, made of ours, and the files that hold them.

`router.layer.weight` [E, D]. `dMoE`: `experts.mlp.w1` (gate; the only one of plain experts), `v1` (up) and `w2` (down,
transposed), each [E * F, D], F rows an expert; here they are seen as [E, F, D]. `MoE`, which drops tokens and has plain
experts alone: `w1` [E, D, F] and `w2` [E, F, D]. Source: MegaBlocks' modules, releases 0.5 to main.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dmoe.checkpoint.formats.mapping import Part, Stored, View, same
from dmoe.checkpoint.formats.megatron.torch_files import load
from dmoe.checkpoint.formats.safetensors_read import INDEX, SINGLE, SafetensorsStore
from dmoe.checkpoint.formats.safetensors_write import SafetensorsSink
from dmoe.checkpoint.formats.store import TensorStore
from dmoe.config import ModelConfig, MoEConfig, require
from dmoe.errors import ConfigError, RunError

Layer = Literal["dMoE", "MoE"]
PICKLED = "model.pt"
STACKED = (".experts.mlp.w1", ".experts.mlp.v1", ".experts.mlp.w2")

_NEEDED = {
    # field of MoEConfig: what MegaBlocks' layers compute
    "routing": "topk",
    "score_function": "softmax",
    "n_group": 1,
    "routed_scaling_factor": 1.0,
    "router_bias": False,
    "expert_bias_rate": 0.0,
    "bias": False,
    "weigh_input": False,
    "latent_size": 0,
    "shared_expert_gate": False,
}


def check_expressible(config: ModelConfig, layer: Layer) -> None:
    """Raise ConfigError, naming the field, for a layer that MegaBlocks does not compute."""
    moe = config.moe
    require(bool(config.moe_layers()), "model.moe_layer_freq", config.moe_layer_freq, "1 or more for MegaBlocks")
    for name, right in _NEEDED.items():
        value = getattr(moe, name)
        require(value == right, f"model.moe.{name}", value, f"{right!r} for MegaBlocks")
    wanted = "False for MegaBlocks' MoE, which has plain experts (dMoE has both)"
    require(layer == "dMoE" or not moe.gated, "model.moe.gated", True, wanted)
    require(moe.activation != "clamped_swiglu", "model.moe.activation", moe.activation, "another one for MegaBlocks")


def layer_mapping(theirs: str, ours: str, D: int, moe: MoEConfig, layer: Layer) -> Iterator[Stored]:
    """The tensors of one layer; `theirs` and `ours` are the prefixes of its names, with a dot."""
    E, F, S = moe.num_experts, moe.intermediate_size, moe.shared_intermediate_size
    yield same(f"{theirs}router.layer.weight", f"{ours}router.weight", E, D)
    mlp, experts = f"{theirs}experts.mlp.", f"{ours}experts."
    up = "gate_up_proj" if moe.gated else "up_proj"
    if layer == "MoE":
        yield _by_expert(f"{mlp}w1", f"{experts}{up}", (E, D, F), transposed)
    elif moe.gated:
        yield _by_expert(f"{mlp}w1", f"{experts}{up}", (E, F, D), lambda t: t[:F])
        yield _by_expert(f"{mlp}v1", f"{experts}{up}", (E, F, D), lambda t: t[F:])
    else:
        yield _by_expert(f"{mlp}w1", f"{experts}{up}", (E, F, D), lambda t: t)
    yield _by_expert(f"{mlp}w2", f"{experts}down_proj", (E, F, D), transposed)
    if S:
        for name in ("gate_proj", "up_proj", "down_proj") if moe.gated else ("up_proj", "down_proj"):
            shape = (D, S) if name == "down_proj" else (S, D)
            yield same(f"{theirs}shared_expert.{name}.weight", f"{ours}shared_experts.{name}.weight", *shape)


def transposed(tensor: Tensor) -> Tensor:
    """The view of a matrix with its dims exchanged."""
    return tensor.T


def _by_expert(name: str, ours: str, shape: tuple[int, int, int], view: View) -> Stored:
    return Stored(name, shape, tuple(Part(ours, e, view, e) for e in range(shape[0])))


def weights(folder: Path) -> Path | None:
    """The file, or index of files, with the weights of a folder."""
    return next((folder / name for name in (INDEX, SINGLE, PICKLED) if (folder / name).is_file()), None)


class _Safetensors(SafetensorsStore):
    """With the weights of dMoE's experts as [E, F, D]; `flat` says whether there are such."""

    def __init__(self, folder: Path, num_experts: int) -> None:
        super().__init__(folder)
        self.flat = any(_is_flat(name, entry.shape) for name, (_, entry) in self._entries.items())
        for name, (path, entry) in self._entries.items():
            shape = _stacked(name, entry.shape, num_experts)
            self._entries[name] = path, entry._replace(shape=shape)


class _Pickled:
    """A state dict of torch.save, mapped from disk, likewise. Implements `TensorStore`."""

    def __init__(self, path: Path, num_experts: int) -> None:
        self._path = path
        state = load(path)
        state = state.get("model", state) if isinstance(state, dict) else state
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise RunError(f"{path}: must be a state dict: names and tensors")
        self.flat = any(_is_flat(name, tuple(tensor.shape)) for name, tensor in state.items())
        self._state = {
            name: tensor.reshape(_stacked(name, tuple(tensor.shape), num_experts)) for name, tensor in state.items()
        }

    def names(self) -> Iterable[str]:
        return self._state.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        return self._state[name] if index is None else self._state[name][index]

    def where(self, name: str) -> str:
        return str(self._path)


def open_store(folder: Path, num_experts: int) -> _Safetensors | _Pickled:
    """The tensors of a folder. Raises ConfigError if it has none, and RunError for damaged files."""
    path = weights(folder)
    if path is None:
        raise ConfigError(f"source is {str(folder)!r}: must have {SINGLE}, {INDEX} or {PICKLED}")
    return _Pickled(path, num_experts) if path.name == PICKLED else _Safetensors(folder, num_experts)


def zero_biases(store: TensorStore) -> list[str]:
    """Names of the experts' output biases. Ours has none: raises ConfigError for one that is not 0."""
    names = [name for name in store.names() if name.endswith(".experts.bias")]
    for name in names:
        if store.read(name).any():
            raise ConfigError(f"{store.where(name)}: {name} is not 0: must be, as it has no place in our layer")
    return names


def _is_flat(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(STACKED) and len(shape) == 2


def _stacked(name: str, shape: tuple[int, ...], num_experts: int) -> tuple[int, ...]:
    if not _is_flat(name, shape) or shape[0] % num_experts:
        return shape
    return (num_experts, shape[0] // num_experts, shape[1])


class Sink(SafetensorsSink):
    """Writes [E, F, D] as [E * F, D] where the file has that, an expert at a time."""

    def write_row(self, name: str, index: int, tensor: Tensor) -> None:
        shape = self._outlines[name].shape
        if tensor.dim() == len(shape):
            self._write(name, tensor, tuple(tensor.shape), index * math.prod(tensor.shape) * tensor.element_size())
        else:
            super().write_row(name, index, tensor)
