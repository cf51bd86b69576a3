"""Recording which experts tokens went to, and sending tokens there again.

    with record_routing(model) as trace:
        model(ids)
    trace.save("routing.safetensors")
    with replay_routing(model, RoutingTrace.load("routing.safetensors")):
        model(ids)            # the same experts, whatever the router says now

The router still computes logits, and weighs the replayed experts by them; so gradients flow as ever. Useful to compare
two implementations whose roundings would choose different experts, and in reinforcement learning, to train with the
choices of the engine that sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dmoe.errors import ConfigError
from dmoe.moe.layer import MoE, moe_layers
from dmoe.moe.recompute import recomputing


@dataclass
class RoutingTrace:
    """Choices of the tokens of this rank."""

    layers: dict[str, list[Tensor]] = field(default_factory=dict)
    """By layer name, for each forward the expert ids [T, K], int64."""

    def save(self, path: str | Path) -> None:
        """Write as safetensors, through a temporary name."""
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {
            f"{name}/{i}": ids.cpu().contiguous() for name, all in self.layers.items() for i, ids in enumerate(all)
        }
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        tensors = load_file(path)
        trace = cls()
        for key in sorted(tensors, key=lambda key: int(key.rpartition("/")[2])):
            trace.layers.setdefault(key.rpartition("/")[0], []).append(tensors[key])
        return trace


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTrace]:
    """Record the choices of every MoE layer of `model`. Not inside the compiler.

    A forward that activation checkpointing runs again is recorded once.
    """
    trace = RoutingTrace()
    layers = _choosing_layers(model)
    for name, layer in layers.items():
        layer.router.replay = _Recording(trace.layers.setdefault(name, []))
    try:
        yield trace
    finally:
        _stop(layers)


@contextmanager
def replay_routing(model: nn.Module, trace: RoutingTrace) -> Iterator[None]:
    """Use the choices of `trace`, a forward after the other. Not inside the compiler.

    Forwards that activation checkpointing (use_reentrant=False) runs again get the choices of the first time, as long
    as all of them are run again, and micro-batches go backward in the order in which they went forward.

    Raises:
        ConfigError: layers or shapes differ from those of the trace, it has ids that are no expert, or a layer runs
            more often than it did; names the layer.
    """
    layers = _choosing_layers(model)
    if layers.keys() != trace.layers.keys():
        raise ConfigError(f"the routing trace has layers {sorted(trace.layers)}: must be {sorted(layers)}")
    for name, layer in layers.items():
        for ids_TK in trace.layers[name]:
            _check_ids(name, ids_TK, layer.config.num_experts)
        layer.router.replay = _Replay(name, trace.layers[name])
    try:
        yield
    finally:
        _stop(layers)


def _choosing_layers(model: nn.Module) -> dict[str, MoE]:
    layers = moe_layers(model)
    for name, layer in layers.items():
        if layer.config.routing == "expert_choice":
            raise ConfigError(f'{name or "the layer"} has routing "expert_choice": only choices of tokens are replayed')
    return layers


def _check_ids(name: str, ids_TK: Tensor, num_experts: int) -> None:
    wrong = ids_TK[(ids_TK < 0) | (ids_TK >= num_experts)]
    if wrong.numel():
        name, wanted = name or "the layer", f"from 0 to {num_experts - 1}"
        raise ConfigError(f"the routing trace of {name} has expert {wrong[0]}: must be {wanted}")


def _stop(layers: dict[str, MoE]) -> None:
    for layer in layers.values():
        layer.router.replay = None


class _Recording:
    def __init__(self, forwards: list[Tensor]) -> None:
        self.forwards = forwards

    def __call__(self, ids_TK: Tensor) -> Tensor:
        _require_eager()
        if not recomputing():
            self.forwards.append(ids_TK.detach().clone())
        return ids_TK


class _Replay:
    def __init__(self, name: str, forwards: list[Tensor]) -> None:
        self.name, self.forwards = name, forwards
        self.done = 0
        self.may_come_again: list[int] = []  # forwards that a backward may run again

    def __call__(self, ids_TK: Tensor) -> Tensor:
        _require_eager()
        if recomputing():
            index = self.may_come_again.pop(0)
        else:
            index, self.done = self.done, self.done + 1
            if torch.is_grad_enabled():
                self.may_come_again.append(index)
        name = self.name or "the layer"
        if index >= len(self.forwards):
            raise ConfigError(f"forward {index + 1} of {name}: the routing trace has {len(self.forwards)}")
        replayed_TK = self.forwards[index]
        if replayed_TK.shape != ids_TK.shape:
            wanted = f"{tuple(ids_TK.shape)}, tokens and top_k of this forward"
            raise ConfigError(f"the routing trace of {name} has shape {tuple(replayed_TK.shape)}: must be {wanted}")
        return replayed_TK.to(ids_TK.device)


def _require_eager() -> None:
    if torch.compiler.is_compiling():
        raise ConfigError("routing is recorded or replayed inside torch.compile: must be outside")
