"""Initial weights, decided by a parameter's name and seeded by it."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from dmoe.moe.init_rules import RULES, Depth, InitOptions, Matrix, Role
from dmoe.moe.streams import Normal, fill_shard

_ROLES: dict[str, Role] = {
    "embed_tokens": "embedding", "o_proj": "output", "down_proj": "output", "fc2_latent_proj": "output",
    "lm_head": "head",
}  # fmt: skip


@torch.no_grad()
def init_parameters(
    module: nn.Module,
    *,
    std: float = 0.02,
    output_std: float | None = None,
    seed: int | None = None,
    rule: str = "normal",
    depth: Depth = "none",
    num_layers: int | None = None,
    base_width: int | None = None,
) -> None:
    """Initialise every parameter of `module` that is not on the meta device.

    Norm weights are 1, biases 0, matrices random with mean 0. Output projections are those that write to the residual
    stream: `o_proj`, `down_proj`, `fc2_latent_proj`. The fan-in is the last dim, of fused experts too: an expert's own.

    Args:
        std: standard deviation.
        output_std: that of output projections, instead of `std`; only without `depth`.
        seed: each parameter draws from a stream of its own, seeded by (seed, its name), so that its values do not
            depend on which other parameters exist, in which order they are drawn, or how they are spread over ranks.
            None: the default generator.
        rule: by `dmoe.moe.init_rules`:
            "normal"        normal, `std`;
            "trunc_normal"  the same, cut at 3 std;
            "mitchell"      1 / sqrt(fan_in), output projections 1 / sqrt(2 * fan_in * (layer + 1)), cut at 3 std;
                            without `std` and `depth`;
            "mup"           normal; the embedding `std`, the head (`lm_head`) std * base_width / fan_in, all others
                            std * sqrt(base_width / fan_in).
        depth: divide the standard deviation of output projections by sqrt(2 * num_layers) ("all"), by
            sqrt(2 * (layer + 1)) ("layer"), or not ("none"). The layer is i of `layers.{i}.` in the name, else 0.
        num_layers: of the whole model, for depth "all".
        base_width: the fan-in at which a matrix has `std` itself, for "mup".

    Raises:
        ConfigError: an argument is unknown, out of range or missing, or `output_std` does not go with the others.
    """
    options = InitOptions(
        std=std, output_std=output_std, rule=rule, depth=depth, num_layers=num_layers, base_width=base_width
    )
    for name, parameter in module.named_parameters():
        if not parameter.is_meta and parameter.numel():
            _init_one(name, parameter, options, seed)


def _init_one(name: str, parameter: Tensor, options: InitOptions, seed: int | None) -> None:
    owner, _, leaf = name.rpartition(".")
    if leaf.endswith("bias"):
        parameter.zero_()
    elif owner.endswith("norm"):
        parameter.fill_(1.0)
    else:
        rule = RULES[options.rule]
        distribution = Normal(rule.std(_matrix(name, parameter), options), rule.cut)
        fill_shard(parameter, distribution, name=name, seed=seed)


def _matrix(name: str, parameter: Tensor) -> Matrix:
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    fan_in = parameter.shape[-1] if parameter.dim() else 1
    return Matrix(_role(name), fan_in, int(layer[1]) if layer else 0)


def _role(name: str) -> Role:
    owner, _, leaf = name.rpartition(".")
    matrix = owner.rpartition(".")[2] if leaf == "weight" else leaf
    return _ROLES.get(matrix, "hidden")
