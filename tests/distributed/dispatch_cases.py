"""Layers whose experts are spread over ranks, next to the plain layer on the tokens of all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.moe import BatchGroups, LoadSummary, MoE, MoEConfig, Recorder
from dmoe.moe.dispatch import AllToAllDispatcher
from dmoe.moe.dispatch_tokens import TokenDispatcher

# Elementwise kernels treat the last elements of a tensor otherwise than the rest, unless widths are multiples of 32.
D, F = 32, 32


@dataclass
class Case:
    """One layer, one batch. `tokens`: a rank's number each. `skew`: "one" sends every token to the last expert first,
    "none" sends nothing to the first expert."""

    tokens: list[int]
    dtype: torch.dtype = torch.float32
    skew: str = ""
    autocast: bool = False
    payload: str = "same"
    max_rows: int = 0
    sends: str = "picks"
    training: bool = True
    seed: int = 0
    device: str = "cpu"
    call: Callable[[MoE], Callable[[Tensor], Tensor]] = field(default=lambda layer: layer)
    config: dict[str, Any] = field(default_factory=dict)

    def full_layer(self) -> MoE:
        """The same on every rank; biases too are random."""
        defaults = {"hidden_size": D, "intermediate_size": F, "num_experts": 4, "top_k": 2, "aux_loss_coef": 0.0,
                    "z_loss_coef": 0.0}  # fmt: skip
        layer = MoE(MoEConfig(**(defaults | self.config)), dtype=self.dtype)
        generator = np.random.default_rng(0)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.from_numpy(generator.normal(size=tuple(parameter.shape)) * 0.3))
            if self.skew == "one":
                layer.router.weight[-1] = 4
            if self.skew == "none":
                layer.router.weight[0] = -4
        return layer.train(self.training).to(self.device)

    def batch(self) -> tuple[list[Tensor], list[Tensor]]:
        """Each rank's tokens, all positive (so that `skew` works), and the gradients of its outputs."""
        generator = np.random.default_rng((self.seed, sum(self.tokens)))
        x = [np.abs(generator.normal(size=(t, D))) for t in self.tokens]
        grads = [generator.normal(size=(t, D)) for t in self.tokens]
        to = {"device": self.device, "dtype": self.dtype}
        return [torch.from_numpy(a).to(**to) for a in x], [torch.from_numpy(a).to(**to) for a in grads]


@dataclass
class Result:
    """What a rank compares: outputs and gradients of its tokens, gradients of parameters, statistics."""

    y: Tensor
    grads: dict[str, Tensor]
    stats: LoadSummary


def spread(layer: MoE, group: dist.ProcessGroup, sends: str = "picks", **options: Any) -> MoE:
    """The same layer with the experts of this rank alone, as `dmoe.parallel` lays them out."""
    layer = copy.deepcopy(layer)
    num_local = layer.config.num_experts // group.size()
    own = slice(group.rank() * num_local, (group.rank() + 1) * num_local)
    for name, parameter in list(layer.experts.named_parameters()):
        layer.experts.register_parameter(name, nn.Parameter(parameter.detach()[own].clone()))
    if sends == "tokens":
        layer.dispatcher = TokenDispatcher(group, layer.config.num_experts, payload=options["payload"])
    else:
        layer.dispatcher = AllToAllDispatcher(group, layer.config.num_experts, **options)
    layer.groups = BatchGroups(batch=group)
    return layer


def run(layer: MoE, x: Tensor, grad: Tensor, case: Case, call: Callable[[Tensor], Tensor] | None = None) -> Result:
    recorder = Recorder(layer)
    leaf = x.clone().requires_grad_()
    with torch.autocast(case.device, dtype=torch.bfloat16) if case.autocast else nullcontext():
        y = (layer if call is None else call)(leaf)
    y.backward(grad.to(y.dtype))
    recorder.update()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return Result(y.detach(), {"x": leaf.grad, **grads}, recorder.summary()[""])


def expected_of(case: Case, rank: int) -> Result:
    """The plain layer in one process; of tokens the part of a rank."""
    x, grads = case.batch()
    result = run(case.full_layer(), torch.cat(x), torch.cat(grads), case)
    result.y = result.y.split(case.tokens)[rank]
    result.grads["x"] = result.grads["x"].split(case.tokens)[rank]
    return result


def expected(case: Case, group: dist.ProcessGroup) -> Result:
    """The same, of experts too the part of this rank."""
    result = expected_of(case, group.rank())
    for name, grad in result.grads.items():
        if name.startswith("experts."):
            result.grads[name] = grad.chunk(group.size())[group.rank()]
    return result


def actual(case: Case, group: dist.ProcessGroup, layers: list[MoE] | None = None) -> Result:
    """What this rank computes; gradients of parameters that all hold are summed over the ranks.

    `layers` keeps the layer for the next call.
    """
    layers = [] if layers is None else layers
    if not layers:
        options = {"sends": case.sends, "payload": case.payload, "max_rows": case.max_rows}
        layers.append(spread(case.full_layer(), group, **options))
    layer = layers[0]
    layer.zero_grad()
    x, grads = (t[group.rank()] for t in case.batch())
    result = run(layer, x, grads, case, case.call(layer))
    for name, grad in result.grads.items():
        assert grad is not None, name
        if name.startswith(("router", "shared")):
            wide = grad.double()
            dist.all_reduce(wide, group=group)
            result.grads[name] = wide.to(grad.dtype)
    return result


def differences(got: Result, want: Result) -> dict[str, float]:
    """Largest difference of each tensor, relative to its largest element; y under "y"."""
    pairs = {"y": (got.y, want.y), **{name: (got.grads[name], want.grads[name]) for name in want.grads}}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        assert a.isfinite().all(), name
    return {
        name: float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-3))
        if a.numel()
        else 0.0
        for name, (a, b) in pairs.items()
    }
