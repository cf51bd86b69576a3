"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685) on the linear maps, the experts and the router of a model.

An adapted module computes with W + scale * B A, scale = alpha / rank; W is frozen, A random and B zero at first. The
names of all other parameters stay what they were:

    ...self_attn.q_proj.lora_A [r, in], lora_B [out, r]             and every other linear map
    ...mlp.experts.up_lora_A [E, r, D], up_lora_B [E, 2, F, r]      (gate rows, then up; [E, 1, F, r] for plain experts)
    ...mlp.experts.down_lora_A [E, r, F], down_lora_B [E, D, r]
    ...mlp.router.lora_A [r, D], lora_B [E, r]
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config import ModelConfig, require
from dmoe.config.train import LoRAConfig
from dmoe.errors import ConfigError
from dmoe.lora.expert_mlp import ExpertAdapters, lora_expert_mlp
from dmoe.lora.names import matches, nearest_names
from dmoe.lora.placement import computed_part, new_factor, split_axis
from dmoe.models import Decoder
from dmoe.moe import Experts, FeedForward, Router
from dmoe.moe.experts import Weights
from dmoe.moe.sharded import is_plain
from dmoe.moe.streams import Normal, fill_shard
from dmoe.parallel import ParallelMesh

_TARGETS = {"attention": ("self_attn",), "mlp": ("gate_proj", "up_proj", "down_proj")}
"""Words for several modules; other targets are parts of a module's name."""


class LoRALinear(nn.Linear):
    """`nn.Linear` with an adapter, which is computed beside the frozen product."""

    lora_A: Tensor
    lora_B: Tensor
    lora_scale: float
    lora_dropout: float

    def forward(self, x: Any) -> Any:
        y: Any = super().forward(x)
        x_local = x if is_plain(x) else _local_input(x)
        dropped = F.dropout(x_local, self.lora_dropout, self.training)
        low = F.linear(F.linear(dropped, computed_part(self.lora_A)), computed_part(self.lora_B))
        low = (low * self.lora_scale).to(y.dtype)
        if is_plain(y):
            return y + low
        from torch.distributed.tensor import DTensor

        return y + DTensor.from_local(low, y.device_mesh, y.placements, run_check=False)


def _local_input(x: Any) -> Tensor:
    """A rank's part of a tensor-parallel input; from a copy each rank makes a part of the output, hence of dx."""
    from torch.distributed.tensor import Partial

    return x.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in x.placements])


class LoRARouter(Router):
    """`Router` with an adapter, computed in the dtype of the logits."""

    lora_A: Tensor
    lora_B: Tensor
    lora_scale: float

    def _logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = super()._logits(x_TD)
        A, B = (computed_part(t).to(logits_TE.dtype) for t in (self.lora_A, self.lora_B))
        return logits_TE + self.lora_scale * F.linear(F.linear(x_TD.to(logits_TE.dtype), A), B)


class LoRAExperts(Experts):
    """`Experts` with adapters on both projections."""

    up_lora_A: Tensor
    up_lora_B: Tensor
    down_lora_A: Tensor
    down_lora_B: Tensor
    lora_scale: float

    def forward(
        self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_rows: int | None = None,
        cast: Weights | None = None,
    ) -> Tensor:  # fmt: skip
        return lora_expert_mlp(
            x_TD,
            topk_ids_TK,
            topk_weights_TK,
            *(self.local_weights() if cast is None else cast),
            self.adapters(),
            scale=self.lora_scale,
            activation=self.config.activation,
        )

    def adapters(self) -> ExpertAdapters:
        """The factors of the experts, and of the part of their width, that this rank computes."""
        up_A, up_B, down_A, down_B = (
            computed_part(t) for t in (self.up_lora_A, self.up_lora_B, self.down_lora_A, self.down_lora_B)
        )
        return ExpertAdapters(up_A, up_B.flatten(1, 2), down_A, down_B)


def check_lora(config: ModelConfig, lora: LoRAConfig) -> None:
    """Raise ConfigError, naming the field, if the adapters of `lora` do not fit the model."""
    with torch.device("meta"):
        modules = _adaptable(Decoder(config))
    for target in lora.targets:
        if not any(_is_target(name, target) for name in modules):
            near = nearest_names(target, [*_TARGETS, *modules])
            require(False, "train.lora.targets", target, f"a part of a module's name with adapters, such as {near}")
    chosen = [module for name, module in modules.items() if any(_is_target(name, t) for t in lora.targets)]
    if any(isinstance(module, Experts) for module in chosen):
        precision = config.moe.precision
        require(precision == "same", "model.moe.precision", precision, '"same" with train.lora on experts')
    if any(isinstance(module, Router) for module in chosen):
        jitter = config.moe.jitter_eps
        require(jitter == 0, "model.moe.jitter_eps", jitter, "0.0 with train.lora on the router")
    if lora.dropout and any(isinstance(module, (Experts, Router)) for module in chosen):
        wanted = "0.0 with adapters on experts or router, which have none"
        require(False, "train.lora.dropout", lora.dropout, wanted)


@torch.no_grad()
def add_adapters(part: Decoder, lora: LoRAConfig, mesh: ParallelMesh | None = None, *, seed: int = 0) -> None:
    """Freeze a model, or a part of one that is laid out over ranks, and give it adapters to train. In place.

    A is normal with standard deviation 1 / sqrt(3 * fan-in), that of PEFT's uniform initial values, from a stream of
    (seed, its name), whatever the layout; B is 0. Factors have the dtype and device of their weight. The biases with
    which experts are chosen stand still, as the routers do.
    """
    for parameter in part.parameters():
        parameter.requires_grad_(False)
    for name, module in _adaptable(part).items():
        if not any(_is_target(name, target) for target in lora.targets):
            continue
        base_class: Any = type(module)
        factors = _factors(name, module, lora.rank, mesh)
        for leaf, factor in factors.items():
            module.register_parameter(leaf, factor)
            if factor.is_meta:
                continue
            if leaf.endswith("_A"):
                std = 1 / math.sqrt(3 * factor.shape[-1])
                fill_shard(factor, Normal(std), name=f"{name}.{leaf}", seed=seed)
            else:
                factor.zero_()
        module.__class__ = _adapted_class(base_class)
        module.lora_base_class, module.lora_scale = base_class, lora.alpha / lora.rank  # type: ignore[assignment]
        if isinstance(module, nn.Linear):
            module.lora_dropout = lora.dropout  # type: ignore[assignment]


def remove_adapters(module: nn.Module) -> None:
    """Make an adapted module what it was, without what its adapter learned."""
    module.__class__ = module.lora_base_class  # type: ignore[assignment]
    for leaf in [leaf for leaf, _ in module.named_parameters(recurse=False) if is_adapter(leaf)]:
        delattr(module, leaf)
    for attribute in ("lora_base_class", "lora_scale", "lora_dropout"):
        module.__dict__.pop(attribute, None)


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have adapters, by name."""
    kinds = (LoRALinear, LoRARouter, LoRAExperts)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is a factor of an adapter."""
    return name.endswith(("lora_A", "lora_B"))


@functools.cache
def _adapted_class(base: Any) -> type[nn.Module]:
    """What a module becomes. FSDP has given those that it gathers classes of their own, which they keep."""
    kind: type[nn.Module] = LoRALinear
    kind = next((k for b, k in ((Router, LoRARouter), (Experts, LoRAExperts)) if issubclass(base, b)), kind)
    return kind if kind.__bases__[0] is base else type(f"LoRA{base.__name__}", (kind, base), {})


def _is_target(name: str, target: str) -> bool:
    return any(matches(name, part) for part in _TARGETS.get(target, (target,)))


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that can have an adapter: linear maps of attention and feed-forward networks, experts, routers."""
    networks = {id(c) for m in model.modules() if isinstance(m, FeedForward) for c in m.children()}

    def is_adaptable(name: str, module: nn.Module) -> bool:
        if type(module) is nn.Linear:
            return id(module) in networks or matches(name, "self_attn")
        return isinstance(module, (Experts, Router))

    return {name: module for name, module in model.named_modules() if is_adaptable(name, module)}


def _factors(name: str, module: Any, rank: int, mesh: ParallelMesh | None) -> dict[str, nn.Parameter]:
    if isinstance(module, Experts):
        return _expert_factors(name, module, rank, mesh)
    weight = module.weight
    num_out, num_in = weight.shape
    axis, dim = split_axis(weight, name)
    if axis not in ("", "tp"):
        raise ConfigError(f"train.lora.targets: {name} is split over {axis!r}: must be split over tp or not at all")
    return {
        "lora_A": new_factor((rank, num_in), weight, mesh, split=1 if dim == 1 else None),
        "lora_B": new_factor((num_out, rank), weight, mesh, split=0 if dim == 0 else None),
    }


def _expert_factors(name: str, module: Experts, rank: int, mesh: ParallelMesh | None) -> dict[str, nn.Parameter]:
    up, down = getattr(module, f"{module._up_name}_proj"), module.down_proj
    num_experts, num_rows, width = up.shape
    expert_width = down.shape[2]
    up_B = (num_experts, num_rows // expert_width, expert_width, rank)  # apart, so that tp cuts gate and up rows alike
    shapes = ((num_experts, rank, width), up_B, (num_experts, rank, expert_width), (num_experts, width, rank))
    axis, _ = split_axis(down, name)
    splits: tuple[int | None, ...] = (None,) * 4
    data = (2, 2, 2, 1)  # widths, of which there is enough for any number of ranks
    if axis == "ep":
        splits = (0,) * 4
    elif axis == "tp":
        splits, data = (None, 2, 2, None), (0,) * 4
    return {
        leaf: new_factor(shape, down, mesh, split=split, data=dim, ep=axis == "ep")
        for leaf, shape, split, dim in zip(
            ("up_lora_A", "up_lora_B", "down_lora_A", "down_lora_B"), shapes, splits, data
        )
    }
