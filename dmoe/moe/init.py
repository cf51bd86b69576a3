"""Initial weights, decided by a parameter's name and seeded by it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from dmoe.moe.sharded import copy_shard, is_plain

_OUTPUT_PROJECTIONS = ("down_proj", "o_proj")


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def init_parameters(
    module: nn.Module, *, std: float = 0.02, output_std: float | None = None, seed: int | None = None
) -> None:
    """Initialise every parameter of `module` that is not on the meta device.

    Norm weights are 1, biases 0, matrices normal with standard deviation `std`; the projections that write to the
    residual stream (`down_proj`, `o_proj`) take `output_std`, for example std / sqrt(2 * layers) as in GPT-2.

    Args:
        seed: each parameter draws from a stream of its own, seeded by (seed, its name), so that its values do not
            depend on which other parameters exist or in which order they are drawn. None: the default generator.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            _init_one(name, parameter, std, std if output_std is None else output_std, seed)


def _init_one(name: str, parameter: Tensor, std: float, output_std: float, seed: int | None) -> None:
    owner, _, leaf = name.rpartition(".")
    if leaf.endswith("bias"):
        parameter.zero_()
    elif owner.rpartition(".")[2].endswith("norm"):
        parameter.fill_(1.0)
    else:
        matrix = owner.rpartition(".")[2] if leaf == "weight" else leaf
        generator = None if seed is None else _generator(seed, name, parameter.device)
        std = output_std if matrix in _OUTPUT_PROJECTIONS else std
        if not is_plain(parameter):
            # The whole parameter is drawn, one at a time, so that the values do not depend on the layout.
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            copy_shard(parameter, whole.normal_(std=std, generator=generator))
        else:
            parameter.normal_(std=std, generator=generator)
