"""Initial weights of llm-foundry's expert blocks: every expert by itself, and the same whatever the layout.

An initialiser reads a parameter's shape (Kaiming, Xavier), and a layer keeps its experts in one parameter. llm-foundry
marks how: `_fused = (0, splits)`, experts one after another in the rows of [E * F, D], or `_stack_dim = 0`, [E, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import require
from dmoe.moe.sharded import is_plain, local

InitFn = Callable[[Tensor], Any]
_FLIPPED = {"fan_in": "fan_out", "fan_out": "fan_in"}


@torch.no_grad()
def init_mb_ffn(ffn: nn.Module, init_fn: InitFn, *, div_is_residual: float = 1.0) -> None:
    """Initialise a block from `build_mb_ffn`: router, experts, shared expert; biases are 0.

    The parameters are those of `init_fused_or_stacked`.
    """
    for module in ffn.modules():
        if hasattr(module, "_fused") or hasattr(module, "_stack_dim"):
            init_fused_or_stacked(module, init_fn, div_is_residual=div_is_residual)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                local(parameter).zero_()
            else:
                init_fn(parameter)
                if getattr(module, "_is_residual", False):
                    local(parameter).div_(div_is_residual)


@torch.no_grad()
def init_fused_or_stacked(module: nn.Module, init_fn: InitFn, *, div_is_residual: float = 1.0) -> None:
    """Initialise w1, w2 and, of gated experts, v1 of `experts.mlp` in a block from `build_mb_ffn`.

    Each rank draws every expert, one at a time, and keeps its own part, so the values are those of one process: under
    expert parallelism, with FSDP2 over it, or neither. The default generator must be seeded alike on every rank.

    Args:
        module: has the mark `_fused` or `_stack_dim`, `hidden_size` (F) and `expert_parallel_group`.
        init_fn: fills a matrix in place. Its shape is the stored one: [F, D] each in fused parameters, in stacked ones
            [D, F] of w1 and [F, D] of w2. Of these the fused w1 and v1 are laid out as in `nn.Linear`, [out, in]; for
            the others the keyword `mode` of a `functools.partial`, "fan_in" or "fan_out", is exchanged.
        div_is_residual: w2, which writes to the residual stream, is divided by it; sqrt(2 * layers) in llm-foundry.
    """
    fused = hasattr(module, "_fused")
    dim: Any = getattr(module, "_fused", (None,))[0] if fused else getattr(module, "_stack_dim", None)
    require(
        dim == 0, f"{type(module).__name__}'s mark _fused or _stack_dim", dim,
        "0, as build_mb_ffn sets it",
    )  # fmt: skip
    flipped = _flip_fan_mode(init_fn)
    for name in ("w1", "w2", "v1"):
        parameter = getattr(module, name, None)
        if parameter is not None and not parameter.is_meta:
            as_linear = fused and name != "w2"
            _draw(module, name, parameter, init_fn if as_linear else flipped)
            if name == "w2" and div_is_residual != 1:
                local(parameter).div_(div_is_residual)


def _draw(module: Any, name: str, parameter: Tensor, init_fn: InitFn) -> None:
    """Draw each expert's matrix and copy what of it lies in this rank's box of the whole parameter."""
    mine = local(parameter)
    whole, offset = _box(module, name, parameter)
    rows = int(module.hidden_size) if parameter.dim() == 2 else 1  # of one expert, along dim 0
    matrix_shape = (rows, *whole[1:]) if parameter.dim() == 2 else whole[1:]
    for start in range(0, whole[0], rows):
        matrix = torch.empty(matrix_shape, dtype=mine.dtype, device=mine.device)
        init_fn(matrix)
        first, last = max(start, offset[0]), min(start + rows, offset[0] + mine.shape[0])
        if first < last:
            part = matrix.view(rows, *whole[1:])[first - start : last - start]
            for d in range(1, mine.dim()):
                part = part.narrow(d, offset[d], mine.shape[d])
            mine[first - offset[0] : last - offset[0]].copy_(part)


def _box(module: Any, name: str, parameter: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of the whole parameter, and where in it this rank's part begins."""
    if not is_plain(parameter):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        return tuple(parameter.shape), tuple(offset)
    shape, group = list(parameter.shape), module.expert_parallel_group
    if group is None:
        return tuple(shape), (0,) * len(shape)
    # Ranks beyond the number of experts share the width of one: rank r holds expert r % E, part r // E of its width.
    width = int(module.hidden_size)
    width_dim = 0 if len(shape) == 2 else 2 if name == "w1" else 1
    local_width = min(width, shape[0]) if width_dim == 0 else shape[width_dim]
    num_parts = width // local_width
    expert_ranks = group.size() // num_parts
    expert_rank, part = group.rank() % expert_ranks, group.rank() // expert_ranks
    start = [0] * len(shape)
    start[0] = expert_rank * shape[0] * (num_parts if width_dim == 0 else 1)
    start[width_dim] += part * local_width
    shape[0] *= expert_ranks
    shape[width_dim] *= num_parts
    return tuple(shape), tuple(start)


def _flip_fan_mode(init_fn: InitFn) -> InitFn:
    mode = init_fn.keywords.get("mode") if isinstance(init_fn, partial) else None
    if mode not in _FLIPPED:
        return init_fn
    assert isinstance(init_fn, partial)
    return partial(init_fn.func, *init_fn.args, **init_fn.keywords | {"mode": _FLIPPED[mode]})
