"""Load statistics and auxiliary-loss values over many forwards, in a recorder that the caller owns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dmoe.moe.batch_sums import SCALARS, scalars_of
from dmoe.moe.dispatch import AllToAllDispatcher
from dmoe.moe.layer import MoE, moe_layers
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
    confidence: float = 0.0
    """Largest score of a token, scores divided by their sum: mean over tokens, then over forwards; 1 is a router that
    is certain, 1 / E one that is undecided."""
    rank_load: list[float] = field(default_factory=list)
    """With expert parallelism the share of the picks on each of its ranks, in their order; else empty."""
    rank_max_over_mean: float = 1.0
    """Load of the busiest of these ranks over their mean load in a forward, mean over forwards: in
    `rank_load` ranks that take turns at being the busiest look even. Where several groups of ranks
    hold the same experts, the load of a rank is that of its like in all groups together. 1 where every expert is
    padded to its capacity: all ranks then have as much to do."""


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
        self._attached = True
        alike: dict[tuple[int, torch.device], _AlikeLayers] = {}
        for name, layer in self._layers.items():
            num_experts, device = layer.config.num_experts, layer.router.weight.device
            layer.stats = LayerStats(num_experts, device)
            alike.setdefault((num_experts, device), _AlikeLayers(num_experts)).add(name, layer, layer.stats)
        self._alike = list(alike.values())
        self.reset()

    def reset(self) -> None:
        """Forget everything that was added up."""
        self._updates = 0

    def detach(self) -> None:
        """Stop the layers from recording."""
        self._attached = False
        for layer in self._layers.values():
            layer.stats = None

    @torch.no_grad()
    def update(self) -> None:
        """Add the last forward of every layer. Stays on the device."""
        if not self._attached:
            return
        for layers in self._alike:
            layers.update(anew=self._updates == 0)
        self._updates += 1

    def summary(self) -> dict[str, LoadSummary]:
        """Statistics per layer name since the last reset; empty before the first update."""
        if self._updates == 0:
            return {}
        found = {name: s for layers in self._alike for name, s in layers.summaries(self._updates).items()}
        return {name: found[name] for name in self._layers}


class _AlikeLayers:
    """L layers of E experts, whose statistics are worked out together: a few kernels for all of them."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._layers: dict[str, MoE] = {}
        self._stats: list[LayerStats] = []
        self._totals_LM = torch.empty(0)

    def add(self, name: str, layer: MoE, stats: LayerStats) -> None:
        self._layers[name] = layer
        self._stats.append(stats)

    def update(self, *, anew: bool) -> None:
        """Add the last forward: counts, scalars, and the busiest rank's load over the mean."""
        flat_LN = torch.stack([stats.flat for stats in self._stats])
        counts_LE = flat_LN[:, : self.num_experts]
        num_ranks = _num_ranks(next(iter(self._layers.values())))
        uneven_L1 = max_over_mean(counts_LE.unflatten(1, (num_ranks, -1)).sum(dim=2)).unsqueeze(1)
        values_LM = torch.cat([counts_LE, scalars_of(flat_LN, self.num_experts), uneven_L1], dim=1)
        self._totals_LM = values_LM if anew else self._totals_LM.add_(values_LM)

    def summaries(self, updates: int) -> dict[str, LoadSummary]:
        """By name, after one transfer. Counts are whole numbers below 2^53, which fp64 holds."""
        rows: list[list[float]] = self._totals_LM.tolist()
        return {name: self._summarize(layer, row, updates) for (name, layer), row in zip(self._layers.items(), rows)}

    def _summarize(self, layer: MoE, totals: list[float], updates: int) -> LoadSummary:
        counts = [round(x) for x in totals[: self.num_experts]]
        sums = dict(zip((*SCALARS, "rank_max_over_mean"), totals[self.num_experts :]))
        means = {key: value / updates for key, value in sums.items() if key != "dropped"}
        if layer.config.pad_to_capacity:
            means["rank_max_over_mean"] = 1.0
        total, num_ranks = max(sum(counts), 1), _num_ranks(layer)
        block = self.num_experts // num_ranks
        blocks = range(0, self.num_experts if num_ranks > 1 else 0, block)
        return LoadSummary(
            tokens_per_expert=counts,
            load=[c / total for c in counts],
            max_over_mean=max(counts) * len(counts) / total,
            dead_experts=counts.count(0),
            dropped=round(sums["dropped"]),
            rank_load=[sum(counts[i : i + block]) / total for i in blocks],
            **means,
        )


def max_over_mean(loads: Tensor) -> Tensor:
    """[...]: the largest of loads [..., N] over their mean; 1 if there is none."""
    return (loads.amax(dim=-1) * loads.shape[-1] / loads.sum(dim=-1).clamp_min(1)).clamp_min(1)


def _num_ranks(layer: MoE) -> int:
    """Ranks over which the experts are spread, in blocks."""
    dispatcher = layer.dispatcher
    return dispatcher.group.size() if isinstance(dispatcher, AllToAllDispatcher) else 1
