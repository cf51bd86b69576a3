"""The upcycled model as a `Source`: each tensor is made when it is read, one expert at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmoe.checkpoint.formats.store import Source
from dmoe.checkpoint.upcycle.experts import (
    Channels,
    expert_bias,
    expert_channels,
    expert_matrix,
    generator,
    router_rows,
)
from dmoe.checkpoint.upcycle.plan import UpcyclePlan, chosen_layers
from dmoe.config import ModelConfig
from dmoe.errors import RunError

if TYPE_CHECKING:
    from dmoe.models import Decoder

_NETWORK = re.compile(r"layers\.(\d+)\.mlp\.((?:gate|up|down)_proj\.(?:weight|bias))")


class UpcycledSource:
    """What `UpcyclePlan` makes of a dense model: a `Source`, read in any order with the same result.

    It holds the network of one dense layer in memory, and what it is asked for: an expert, if read by index.

    Raises:
        ConfigError: the source is not dense, or the plan does not fit it.
    """

    def __init__(self, source: Source, plan: UpcyclePlan) -> None:
        self.config = plan.config(source.config)
        self.plan, self._source = plan, source
        chosen = chosen_layers(plan.layers, source.config.num_layers)
        self._mixtures = [i for i, is_moe in enumerate(chosen) if is_moe]
        self._width = source.config.intermediate_size
        self._held: dict[str, Tensor] = {}
        self._stds: dict[str, float] = {}
        self._made = {f"layers.{i}.mlp.{leaf}": (i, leaf) for i in self._mixtures for leaf in self._leaves()}

    def names(self) -> Iterable[str]:
        """Those of the dense model, each network's replaced by the layer's, where its first one stood."""
        done = set()
        for name in self._source.names():
            match = _NETWORK.fullmatch(name)
            layer = int(match[1]) if match else -1
            if layer not in self._mixtures:
                yield name
            elif layer not in done:
                done.add(layer)
                yield from (made for made, (of, _) in self._made.items() if of == layer)

    def dtype(self, name: str) -> torch.dtype:
        """That of the dense matrix that a tensor is made from; of the router, that of the gate projection."""
        if name not in self._made:
            return self._source.dtype(name)
        layer, leaf = self._made[name]
        network = "down_proj" if "down" in leaf else "up_proj" if leaf.endswith("up_proj.weight") else "gate_proj"
        return self._source.dtype(f"layers.{layer}.mlp.{network}.weight")

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor of the upcycled model, or its row `index`, on the CPU."""
        if name not in self._made:
            return self._source.read(name, index)
        layer, leaf = self._made[name]
        make = self._of_expert(leaf)
        if make is not None:
            experts = range(self.config.moe.num_experts) if index is None else [index]
            made = [make(layer, expert) for expert in experts]
            return torch.stack(made) if index is None else made[0]
        tensor = self._of_layer(layer, leaf).to(self.dtype(name))
        return tensor if index is None else tensor[index].clone()

    def _leaves(self) -> list[str]:
        """Names of the tensors of a layer, after `layers.N.mlp.`, in the order of the model."""
        moe = self.config.moe
        leaves = ["router.weight", "experts.gate_up_proj", "experts.down_proj"]
        if moe.bias:
            leaves += ["experts.gate_up_bias", "experts.down_bias"]
        if moe.shared_intermediate_size:
            kinds = ["weight", "bias"] if moe.bias else ["weight"]
            leaves += [f"shared_experts.{m}_proj.{kind}" for m in ("gate", "up", "down") for kind in kinds]
        return [*leaves, "shared_expert_gate.weight"] if moe.shared_expert_gate else leaves

    def _of_expert(self, leaf: str) -> Callable[[int, int], Tensor] | None:
        makers = {
            "experts.gate_up_proj": self._gate_up_proj,
            "experts.down_proj": self._down_proj,
            "experts.gate_up_bias": self._gate_up_bias,
            "experts.down_bias": self._down_bias,
        }
        return makers.get(leaf)

    def _gate_up_proj(self, layer: int, expert: int) -> Tensor:
        channels = self._channels(layer, expert)
        halves = (self._matrix(layer, which, channels, expert, dim=0, scale=1.0) for which in ("gate_proj", "up_proj"))
        return torch.cat(list(halves))

    def _down_proj(self, layer: int, expert: int) -> Tensor:
        scale = self.plan.routed_scale(self._width)
        return self._matrix(layer, "down_proj", self._channels(layer, expert), expert, dim=1, scale=scale)

    def _gate_up_bias(self, layer: int, expert: int) -> Tensor:
        channels = self._channels(layer, expert)
        return torch.cat([expert_bias(self._dense(layer, f"{m}_proj.bias"), channels) for m in ("gate", "up")])

    def _down_bias(self, layer: int, expert: int) -> Tensor:
        # Each of a copy's G parts adds its own, with the weight and factor that a part has.
        scale = self.plan.routed_scale(self._width) / self.plan.granularity
        return _scaled(self._dense(layer, "down_proj.bias"), scale)

    def _of_layer(self, layer: int, leaf: str) -> Tensor:
        """A tensor that is not about single experts."""
        plan, size = self.plan, self.plan.shared_size
        if leaf == "router.weight":
            return router_rows(plan, self.config.hidden_size, layer)
        if leaf == "shared_expert_gate.weight":
            return torch.zeros(1, self.config.hidden_size)
        network = leaf.removeprefix("shared_experts.")
        dense = self._dense(layer, network)
        if network == "down_proj.weight":
            return _scaled(dense[:, :size], plan.shared_scale(self._width))
        if network == "down_proj.bias":
            return _scaled(dense, plan.shared_scale(self._width) if plan.shared_share(self._width) else 0.0)
        return dense[:size].clone()

    def _channels(self, layer: int, expert: int) -> Channels:
        return expert_channels(self.plan, self._width, layer, expert)

    def _matrix(self, layer: int, which: str, channels: Channels, expert: int, *, dim: int, scale: float) -> Tensor:
        dense, std = self._dense(layer, f"{which}.weight"), 0.0
        if self.plan.method == "noise":
            key = f"{layer}.{which}"
            if key not in self._stds:
                self._stds[key] = _std(dense)
            std = self._stds[key]
        draw = generator(self.plan.seed, layer, which, expert)
        return expert_matrix(self.plan, dense, channels, dim=dim, scale=scale, std=std, draw=draw)

    def _dense(self, layer: int, network: str) -> Tensor:
        """A tensor of the dense network; all of one layer's that were read are kept until another layer's is."""
        name = f"layers.{layer}.mlp.{network}"
        if name not in self._held:
            prefix = f"layers.{layer}.mlp."
            self._held = {held: tensor for held, tensor in self._held.items() if held.startswith(prefix)}
            tensor, out = self._source.read(name), network.startswith("down")
            channels_at = 1 if out and network.endswith("weight") else 0
            wanted = self.config.hidden_size if out and network.endswith("bias") else self._width
            if tensor.shape[channels_at] != wanted:
                raise RunError(f"{name} has shape {tuple(tensor.shape)}: must have size {wanted} in dim {channels_at}")
            self._held[name] = tensor
        return self._held[name]


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """A new tensor of the same dtype, multiplied in fp32 or wider."""
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale).to(tensor.dtype)


def _std(matrix: Tensor) -> float:
    """Standard deviation in fp64, a block of rows at a time."""
    blocks = matrix.split(1024)
    mean = sum(block.sum(dtype=torch.float64).item() for block in blocks) / matrix.numel()
    return float((sum((block.double() - mean).square().sum().item() for block in blocks) / matrix.numel()) ** 0.5)


class ModelSource:
    """A model in memory as a `Source`."""

    def __init__(self, model: Decoder) -> None:
        self.config: ModelConfig = model.config
        self._state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        if model.config.tie_embeddings:
            self._state.pop("lm_head.weight", None)

    def names(self) -> Iterable[str]:
        return self._state.keys()

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A copy on the CPU."""
        tensor = self._state[name]
        return (tensor if index is None else tensor[index]).to("cpu", copy=True)


@torch.no_grad()
def upcycle_model(model: Decoder, plan: UpcyclePlan) -> Decoder:
    """A new model on the device of `model` and in its dtypes, upcycled from it; see `UpcyclePlan`."""
    from dmoe.models import Decoder

    source = UpcycledSource(ModelSource(model), plan)
    with torch.device("meta"):
        upcycled = Decoder(source.config)
    upcycled.to(model.embed_tokens.weight.dtype).to_empty(device=model.embed_tokens.weight.device)
    state = upcycled.state_dict()
    for name in source.names():
        if ".experts." in name:
            for expert in range(source.config.moe.num_experts):
                state[name][expert].copy_(source.read(name, expert))
        else:
            state[name].copy_(source.read(name))
    return upcycled.train(model.training)
