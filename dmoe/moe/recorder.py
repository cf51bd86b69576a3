"""Load statistics and auxiliary-loss values over many forwards, in a recorder that the caller owns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmoe.moe.batch_sums import SCALARS
from dmoe.moe.layer import moe_layers
from dmoe.moe.stats import LayerStats


@dataclass(frozen=True)
class LoadSummary:
    """Statistics of one layer since the last reset."""

    tokens_per_expert: list[int]
    """Picks per expert, those over its capacity too."""
    load: list[float]
    """Share of the picks per expert; sums to 1. Equal load is 1 / E."""
    max_over_mean: float
    """Load of the busiest expert over the mean load; 1 is balance, E / K the worst."""
    dead_experts: int
    """Experts that received nothing."""
    router_entropy: float
    """Mean entropy of the scores in nats, mean over forwards; ln E is an undecided router."""
    aux_loss: float
    """Load-balancing loss without its coefficient, mean over forwards; 1 is balance."""
    z_loss: float
    """Router z-loss without its coefficient, mean over forwards."""
    dropped: int = 0
    """Picks that went to no expert because it was full, with `capacity_factor`."""
    seq_aux_loss: float = 0.0
    """Load-balancing loss of single sequences, mean over them and over forwards; 0 without `seq_aux_loss_coef`."""
    global_aux_loss: float = 0.0
    """Load-balancing loss with the load of the optimiser step so far, mean over forwards; `aux_loss` without
    `global_aux_loss_coef`."""


class Recorder:
    """Collects load statistics of every MoE layer in `model`.

        recorder = Recorder(model)
        loss = model(batch); loss.backward(); recorder.update()      # after each micro-batch
        recorder.summary()["layers.0.mlp"].max_over_mean             # synchronises with the device
        recorder.reset()

    Without a recorder the layers record nothing. Attach it on every rank of a batch, after the model is on its device.
    One at a time: a new recorder replaces the old one; `detach()` ends recording.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = moe_layers(model)
        for layer in self._layers.values():
            weight = layer.router.weight
            layer.stats = LayerStats(layer.config.num_experts, weight.device)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was added up."""
        self._updates = 0
        self._counts: dict[str, Tensor] = {}
        self._scalars: dict[str, Tensor] = {}

    def detach(self) -> None:
        """Stop the layers from recording."""
        for layer in self._layers.values():
            layer.stats = None

    @torch.no_grad()
    def update(self) -> None:
        """Add the last forward of every layer. Stays on the device."""
        self._updates += 1
        for name, layer in self._layers.items():
            stats = layer.stats
            if stats is None:
                continue
            counts, scalars = stats.tokens_per_expert_E, stats.scalars
            self._counts[name] = counts + self._counts[name] if name in self._counts else counts.clone()
            self._scalars[name] = scalars + self._scalars[name] if name in self._scalars else scalars.clone()

    def summary(self) -> dict[str, LoadSummary]:
        """Statistics per layer name since the last reset; empty before the first update."""
        return {name: self._summarize(name) for name in self._counts}

    def _summarize(self, name: str) -> LoadSummary:
        counts: list[int] = self._counts[name].tolist()
        totals = dict(zip(SCALARS, self._scalars[name].tolist()))
        means = {key: value / self._updates for key, value in totals.items() if key != "dropped"}
        total = max(sum(counts), 1)
        return LoadSummary(
            tokens_per_expert=counts,
            load=[c / total for c in counts],
            max_over_mean=max(counts) * len(counts) / total,
            dead_experts=counts.count(0),
            dropped=round(totals["dropped"]),
            **means,
        )
