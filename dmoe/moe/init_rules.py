"""Rules for the standard deviation of initial weights, chosen by name: one function each, and `RULES`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dmoe.config import require

Depth = Literal["all", "layer", "none"]
Role = Literal["embedding", "hidden", "output", "head"]


class Matrix(NamedTuple):
    """What a rule knows of a weight matrix."""

    role: Role
    """"output" writes to the residual stream, as `o_proj`. "hidden" is any other, the router included."""
    fan_in: int
    """Its last dim: of fused experts an expert's own, D of [E, 2F, D] and F of [E, D, F]."""
    layer: int
    """Index of its decoder layer, from 0; 0 outside of any."""


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """The arguments of `init_parameters` that rules look at, checked."""

    std: float
    output_std: float | None
    rule: str
    depth: Depth
    num_layers: int | None
    base_width: int | None

    def __post_init__(self) -> None:
        require(self.rule in RULES, "rule", self.rule, f"one of {', '.join(RULES)}")
        require(self.depth in ("all", "layer", "none"), "depth", self.depth, "one of all, layer, none")
        for name, value in (("std", self.std), ("output_std", self.output_std)):
            require(value is None or (math.isfinite(value) and value >= 0), name, value, "finite and 0 or greater")
        if self.output_std is not None:
            plain = self.rule in ("normal", "trunc_normal") and self.depth == "none"
            wanted = 'None, unless rule is "normal" or "trunc_normal" and depth is "none"'
            require(plain, "output_std", self.output_std, wanted)
        if self.depth == "all" and self.rule != "mitchell":
            require((self.num_layers or 0) > 0, "num_layers", self.num_layers, 'greater than 0 with depth "all"')
        if self.rule == "mup":
            require((self.base_width or 0) > 0, "base_width", self.base_width, 'greater than 0 with rule "mup"')


def plain_std(matrix: Matrix, options: InitOptions) -> float:
    """`std` for every matrix; output projections by depth, as in GPT-2 (Radford et al., 2019, section 2.3), or
    `output_std`."""
    if matrix.role == "output" and options.output_std is not None:
        return options.output_std
    return _by_depth(options.std, matrix, options)


def mitchell_std(matrix: Matrix, options: InitOptions) -> float:
    """1 / sqrt(fan_in); output projections 1 / sqrt(2 * fan_in * (layer + 1)).

    The initialisation called "mitchell" in the code of OLMo (Groeneveld et al., arXiv:2402.00838), which scales by
    depth as Zhang et al., arXiv:1908.11365. It has no free number: `std` and `depth` are not used.
    """
    if matrix.role == "output":
        return 1 / math.sqrt(2 * matrix.fan_in * (matrix.layer + 1))
    return 1 / math.sqrt(matrix.fan_in)


def mup_std(matrix: Matrix, options: InitOptions) -> float:
    """Width as in muP (Yang et al., "Tensor Programs V", arXiv:2203.03466, table 3).

    The embedding has `std` at any width, hidden matrices and output projections std * sqrt(base_width / fan_in), the
    head std * base_width / fan_in: all `std` where the fan-in is `base_width`. Output projections are also scaled by
    depth, of which muP says nothing.

    This is the initialisation alone. Not here: the learning rates of that table (with Adam, those of hidden matrices
    and of the head divided by the width); its table 8, the form for a head tied to the embedding, in which the head is
    drawn like the embedding and the logits are divided by the width instead; attention scores divided by the head's
    width, not by its square root (definition 4.1); and the router, whose number of outputs does not grow with the
    width, treated as a head.
    """
    if matrix.role == "embedding":
        return options.std
    ratio = (options.base_width or 0) / matrix.fan_in
    if matrix.role == "head":
        return options.std * ratio
    return _by_depth(options.std * math.sqrt(ratio), matrix, options)


def _by_depth(std: float, matrix: Matrix, options: InitOptions) -> float:
    if matrix.role != "output" or options.depth == "none":
        return std
    layers = matrix.layer + 1 if options.depth == "layer" else options.num_layers or 0
    return std / math.sqrt(2 * layers)


class InitRule(NamedTuple):
    """A distribution of mean 0."""

    std: Callable[[Matrix, InitOptions], float]
    cut: float | None
    """Largest size, in standard deviations."""


RULES = {
    "normal": InitRule(plain_std, None),
    "trunc_normal": InitRule(plain_std, 3.0),
    "mitchell": InitRule(mitchell_std, 3.0),
    "mup": InitRule(mup_std, None),
}
