"""`RoutingAccumulator`: routing of a text that comes in batches, added up into a `RoutingSummary`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dmoe.config import require
from dmoe.moe import moe_layers
from dmoe.observe.routing.capture import LayerRouting, layer_indices
from dmoe.observe.routing.summary import HISTOGRAM_BINS, TOKENS_LISTED, Array, RoutingSummary
from dmoe.observe.routing.tokens import count_pairs, default_min_count, text_of, top_tokens
from dmoe.ops.precision import autocast_off

_BLOCK = 1 << 22  # probabilities that are looked at together


class _LayerSums:
    """Sums over the tokens of one layer; fp64 on the CPU."""

    def __init__(self, num_experts: int) -> None:
        self.picks_E = np.zeros(num_experts)
        self.prob_E = np.zeros(num_experts)
        self.entropy = self.confidence = self.margin = self.dropped = 0.0
        self.hist_B = np.zeros(HISTOGRAM_BINS)
        self.together_EE = np.zeros((num_experts, num_experts))
        self.tokens: list[Array] = []
        self.picks: list[Array] = []

    def add_block(self, ids_TK: Tensor, probs_TE: Tensor, top_k: int) -> None:
        """Tokens that are no padding."""
        num_experts = probs_TE.shape[1]
        probs_TE = probs_TE.double()
        best = probs_TE.topk(min(top_k + 1, num_experts), dim=1).values
        margin = (best[:, -2] - best[:, -1]).sum() if num_experts > top_k else probs_TE.new_zeros(())
        confidence_T = best[:, 0]
        bins_T = (confidence_T * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
        picked_TE = torch.zeros(len(ids_TK), num_experts + 1, device=ids_TK.device).scatter_(1, ids_TK, 1.0)
        picked_TE = picked_TE[:, :num_experts]
        with autocast_off(picked_TE):  # at most 2**22 tokens a block: whole numbers in fp32, also in products by tf32
            together_EE = picked_TE.t() @ picked_TE
        scalars = torch.stack([torch.special.entr(probs_TE).sum(), confidence_T.sum(), margin])
        self.prob_E += _numpy(probs_TE.sum(dim=0))
        entropy, confidence, margins = scalars.tolist()
        self.entropy, self.confidence = self.entropy + entropy, self.confidence + confidence
        self.margin += margins
        self.hist_B += np.bincount(_numpy(bins_T), minlength=HISTOGRAM_BINS)
        self.together_EE += _numpy(together_EE)
        self.picks_E += _numpy(picked_TE.sum(dim=0))


class RoutingAccumulator:
    """Sums over batches of the routing of `layers`, each of `num_experts` experts.

    Memory: the picks of every token in 2 bytes each, E * E numbers a layer, and a batch at a time of probabilities.

    Args:
        layers: the model's indices of its MoE layers.
        top_k: picks a token by the config.
    """

    def __init__(self, layers: Sequence[int], num_experts: int, top_k: int) -> None:
        require(len(layers) > 0, "layers", list(layers), "at least one")
        require(1 <= top_k <= num_experts, "top_k", top_k, f"from 1 to the {num_experts} experts")
        self.layers, self.num_experts, self.top_k = list(layers), num_experts, top_k
        self._sums = {layer: _LayerSums(num_experts) for layer in self.layers}
        self._dtype = np.int16 if num_experts < 2**15 else np.int32

    @classmethod
    def of(cls, model: nn.Module) -> RoutingAccumulator:
        """For all MoE layers of `model`. Raises ConfigError if it has none, or they differ in experts or picks."""
        layers = moe_layers(model)
        require(bool(layers), "model", type(model).__name__, "one with MoE layers")
        sizes = {(layer.config.num_experts, layer.config.top_k) for layer in layers.values()}
        require(len(sizes) == 1, "(num_experts, top_k) of the layers", sorted(sizes), "the same in all MoE layers")
        return cls(layer_indices(list(layers)), *sizes.pop())

    def add(
        self,
        layer: int,
        ids_TK: Tensor | Array,
        probs_TE: Tensor | Array,
        token_ids_T: Tensor | Array,
        *,
        valid_T: Tensor | Array | None = None,
        dropped: Tensor | int | None = None,
    ) -> None:
        """Add T tokens of one layer. Every layer gets the same tokens in the same order.

        Args:
            ids_TK: expert ids in [0, E], distinct but for E, which is no expert.
            probs_TE: scores that sum to 1 over the experts.
            token_ids_T: ids of the tokens that went in.
            valid_T: bool; tokens where it is False are left out. None: all count.
            dropped: picks over capacity.

        Raises:
            ConfigError: shapes that do not belong together, or an unknown layer.
        """
        require(layer in self._sums, "layer", layer, f"one of {self.layers}")
        ids_TK, probs_TE, token_ids_T = (torch.as_tensor(t) for t in (ids_TK, probs_TE, token_ids_T))
        num_tokens = len(ids_TK)
        shapes = (tuple(ids_TK.shape[:1]), tuple(probs_TE.shape), tuple(token_ids_T.shape))
        wanted = ((num_tokens,), (num_tokens, self.num_experts), (num_tokens,))
        require(shapes == wanted, "shapes of ids (rows), probabilities and token ids", shapes, f"{wanted}")
        if valid_T is not None:
            valid_T = torch.as_tensor(valid_T).to(ids_TK.device)
            ids_TK, probs_TE = ids_TK[valid_T], probs_TE[valid_T]
            token_ids_T = token_ids_T[valid_T.to(token_ids_T.device)]
        sums, ids_TK = self._sums[layer], ids_TK.long()
        rows = max(1, _BLOCK // self.num_experts)
        for start in range(0, len(ids_TK), rows):
            block = slice(start, start + rows)
            sums.add_block(ids_TK[block], probs_TE[block], self.top_k)
        sums.picks.append(_numpy(ids_TK.sort(dim=1).values).astype(self._dtype))
        sums.tokens.append(_numpy(token_ids_T).astype(np.int32))
        sums.dropped += 0 if dropped is None else int(dropped)

    def add_layers(self, routing: Mapping[int, LayerRouting], token_ids_T: Tensor | Array) -> None:
        """Add what `Capture.take` returned for the tokens `token_ids_T`."""
        for layer, part in routing.items():
            self.add(
                layer, part.ids_TK, part.probs_TE, token_ids_T, valid_T=part.valid_T, dropped=part.dropped
            )  # fmt: skip

    def token_ids(self) -> Array:
        """int32 [T]: the tokens so far, without padding. Raises ConfigError if layers got different ones."""
        first, *others = [
            np.concatenate([np.zeros(0, np.int32), *self._sums[layer].tokens]) for layer in self.layers
        ]  # fmt: skip
        for layer, other in zip(self.layers[1:], others):
            require(np.array_equal(first, other), "tokens of layer", layer, "those of the first layer")
        return np.asarray(first)

    def summary(
        self, *, step: int = 0, name: str = "", listed: int = TOKENS_LISTED, min_count: int | None = None
    ) -> RoutingSummary:
        """The summary of all that was added.

        Args:
            listed: tokens listed for each expert.
            min_count: picks that a token needs to be listed. None: 3, or 1 in 5000 tokens if that is more.

        Raises:
            ConfigError: the layers got different tokens.
        """
        token_ids_T, sums = self.token_ids(), [self._sums[layer] for layer in self.layers]
        tokens = len(token_ids_T)
        n, experts = max(tokens, 1), self.num_experts
        min_count = default_min_count(tokens) if min_count is None else min_count
        text = text_of(token_ids_T.astype(np.int64))
        picks_LTK = _stacked([part.picks for part in sums], tokens, experts, self._dtype)
        tables = [
            top_tokens(text, count_pairs(text.places_T, picks_TK, experts, len(text.vocab_U)), experts, listed,
                       min_count)
            for picks_TK in picks_LTK
        ]  # fmt: skip
        ids_LEN, lift_LEN, count_LEN = (np.stack(arrays) for arrays in zip(*tables))
        totals = [max(part.picks_E.sum(), 1) for part in sums]
        return RoutingSummary(
            layers=np.array(self.layers, dtype=np.int64), num_tokens=tokens, top_k=self.top_k,
            load_LE=np.stack([part.picks_E / total for part, total in zip(sums, totals)]),
            prob_LE=np.stack([part.prob_E / n for part in sums]),
            entropy_L=np.array([part.entropy / n for part in sums]),
            confidence_L=np.array([part.confidence / n for part in sums]),
            margin_L=np.array([part.margin / n for part in sums]),
            confidence_hist_LB=np.stack([part.hist_B / n for part in sums]),
            dropped_L=np.array([part.dropped / total for part, total in zip(sums, totals)]),
            coactivation_LEE=np.stack([part.together_EE / n for part in sums]).astype(np.float32),
            token_ids_LEN=ids_LEN, token_lift_LEN=lift_LEN, token_count_LEN=count_LEN, picks_LTK=picks_LTK,
            text_hash=text_hash(token_ids_T), step=step, name=name,
        )  # fmt: skip


def summarize(
    routing: Mapping[int, LayerRouting],
    token_ids_T: Tensor | Array,
    *,
    top_k: int,
    step: int = 0,
    name: str = "",
    min_count: int | None = None,
) -> RoutingSummary:
    """The summary of one batch: `routing` by layer, as `Capture.take` returns it or gathered from ranks.

    Errors as in `RoutingAccumulator.add`.
    """
    require(bool(routing), "routing", dict(routing), "at least one layer")
    layers = sorted(routing)
    accumulator = RoutingAccumulator(layers, routing[layers[0]].probs_TE.shape[1], top_k)
    accumulator.add_layers(routing, token_ids_T)
    return accumulator.summary(step=step, name=name, min_count=min_count)


def text_hash(token_ids_T: Array) -> str:
    """sha256 of token ids as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(token_ids_T, dtype="<i4").tobytes()).hexdigest()


def _stacked(layers: list[list[Array]], tokens: int, experts: int, dtype: type) -> Array:
    """[L, T, K] of the batches of each layer; narrower ones are filled up with E."""
    width = max((part.shape[1] for parts in layers for part in parts), default=0)
    out = np.full((len(layers), tokens, width), experts, dtype=dtype)
    for rows, parts in zip(out, layers):
        start = 0
        for part in parts:
            rows[start : start + len(part), : part.shape[1]] = part
            start += len(part)
    return out


def _numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().cpu().numpy())
