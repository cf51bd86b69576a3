"""Listening to the routers of a model while it reads text."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmoe.config import require
from dmoe.moe import moe_layers
from dmoe.moe.recompute import recomputing
from dmoe.moe.router import Routing
from dmoe.ops.balancing import normalized_scores


class LayerRouting(NamedTuple):
    """How T tokens were routed by one layer, padding included. All on the layer's device."""

    ids_TK: Tensor
    """int64: experts picked, whether or not they had room; E for no expert. With "expert_choice" K is the most experts
    that took one token."""
    probs_TE: Tensor
    """Scores that sum to 1, fp32 or fp64."""
    valid_T: Tensor | None = None
    """bool: False for padding. None: there is none."""
    dropped: Tensor | None = None
    """int64 scalar: picks over capacity. None: none was."""


class Capture:
    """What the routers did since the last `take`, by the layer's index in the model."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        """Indices of the MoE layers, in order."""
        self._forwards: dict[int, list[LayerRouting]] = {}

    def _add(self, layer: int, routing: LayerRouting) -> None:
        self._forwards.setdefault(layer, []).append(routing)

    def take(self) -> dict[int, LayerRouting]:
        """The routing of each layer that ran, its forwards one after the other; they are forgotten here."""
        forwards, self._forwards = self._forwards, {}
        return {layer: _joined(parts) for layer, parts in forwards.items()}


@contextlib.contextmanager
def capture(model: nn.Module) -> Iterator[Capture]:
    """Collect the routing of every forward of `model`, meant for evaluation mode and `torch.no_grad()`.

    A layer keeps T * (E + 2K) numbers a forward until `take`. Compiled parts run uncompiled meanwhile. Tensors stay
    where they are, and nothing synchronises with the device, but for routing "expert_choice".

    Raises:
        ConfigError: the model has no MoE layer.
    """
    layers = moe_layers(model)
    require(bool(layers), "model", type(model).__name__, "one with MoE layers")
    indices = dict(zip(layers, layer_indices(list(layers))))
    captured = Capture(list(indices.values()))
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # what is compiled does not see hooks that come later
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in layers.items():
            stack.callback(layer.router.register_forward_hook(_Hook(captured, indices[name])).remove)
        yield captured


class _Hook:
    def __init__(self, captured: Capture, layer: int) -> None:
        self._captured, self._layer = captured, layer

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: Any, routing: Routing) -> None:
        if not recomputing():
            self._captured._add(self._layer, layer_routing(routing))


@torch.no_grad()
def layer_routing(routing: Routing) -> LayerRouting:
    """What a router said, in the form that summaries are made of."""
    num_experts, slots = routing.scores_TE.shape[1], routing.slots
    if slots is not None and slots.picks_TK is None:
        ids_TK = picks_of_slots(slots.tokens_EC, routing.scores_TE.shape[0])
    else:
        ids_TK = routing.ids_before_drop.detach()
    if routing.valid_T is not None:
        ids_TK = ids_TK.where(routing.valid_T.unsqueeze(1), num_experts)
    return LayerRouting(ids_TK, normalized_scores(routing.scores_TE.detach()), routing.valid_T, routing.dropped)


def picks_of_slots(tokens_EC: Tensor, num_tokens: int) -> Tensor:
    """int64 [T, K]: the experts that took each token, rising, filled up with E; K is the most that took one."""
    num_experts = tokens_EC.shape[0]
    taken_TE = torch.zeros(num_tokens + 1, num_experts, dtype=torch.bool, device=tokens_EC.device)
    experts_EC = torch.arange(num_experts, device=tokens_EC.device).unsqueeze(1).expand_as(tokens_EC)
    taken_TE[tokens_EC.flatten(), experts_EC.flatten()] = True
    taken_TE = taken_TE[:num_tokens]
    width = int(taken_TE.sum(dim=1).max()) if num_tokens else 0
    ids_E = torch.arange(num_experts, device=tokens_EC.device)
    return ids_E.where(taken_TE, num_experts).sort(dim=1).values[:, :width]


def layer_indices(names: list[str]) -> list[int]:
    """The number in each module name ("layers.3.mlp" is 3); 0, 1, ... if one has none or two have the same."""
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    indices = [int(match[1]) for match in found if match is not None]
    return indices if len(set(indices)) == len(names) else list(range(len(names)))


def _joined(parts: list[LayerRouting]) -> LayerRouting:
    if len(parts) == 1:
        return parts[0]
    num_experts, width = parts[0].probs_TE.shape[1], max(part.ids_TK.shape[1] for part in parts)
    ids = [torch.nn.functional.pad(part.ids_TK, (0, width - part.ids_TK.shape[1]), value=num_experts) for part in parts]
    valid = None
    if any(part.valid_T is not None for part in parts):
        valid = torch.cat(
            [
                torch.ones(len(part.ids_TK), dtype=torch.bool, device=part.ids_TK.device)
                if part.valid_T is None
                else part.valid_T
                for part in parts
            ]
        )
    dropped = [part.dropped for part in parts if part.dropped is not None]
    return LayerRouting(
        torch.cat(ids), torch.cat([part.probs_TE for part in parts]), valid,
        torch.stack(dropped).sum() if dropped else None,
    )  # fmt: skip
