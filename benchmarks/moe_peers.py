"""The implementations that `moe_layer.py` compares: ours, what torch and transformers offer, other kernel libraries.

Each builder takes gate_up_proj [E, 2F, D] and down_proj [E, D, F] and gives a `Contestant` over them. Nothing is
imported before it is built: a library that is absent, or does not work here, is a reason in the list of those left out.
A library is called as its documentation shows; where it wants its weights in another layout, they are converted
beforehand, outside the timing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.bench.alternatives import grouped_mm
from dmoe.bench.contest import Contestant, Limit
from dmoe.bench.inputs import Shape, dense_weights
from dmoe.bench.layer import fast_backends
from dmoe.bench.limits import BalancedProducts, dense_swiglu
from dmoe.bench.measure import attempt
from dmoe.ops import expert_mlp

Builder = Callable[[Shape, Tensor, Tensor], Contestant | Limit]
LIMITS = ("bmm", "dense")


class Absent(Exception):
    """A library is not installed."""


def _library(name: str) -> Any:
    """A module, or `Absent` in one line."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"not installed ({error})") from None


def _ours(backend: str) -> Builder:
    def build(_shape: Shape, gate_up: Tensor, down: Tensor) -> Contestant:
        return Contestant(
            f"dmoe-{backend}", lambda x, ids, w: expert_mlp(x, ids, w, gate_up, down, backend=backend), (gate_up, down)
        )

    return build


def _grouped_mm(_shape: Shape, gate_up: Tensor, down: Tensor) -> Contestant:
    return Contestant("grouped_mm", lambda x, ids, w: grouped_mm(x, ids, w, gate_up, down), (gate_up, down))


def _grouped_mm_compiled(_shape: Shape, gate_up: Tensor, down: Tensor) -> Contestant:
    # Exact shapes, as a training run has them; in one graph, or an error: it must not fall back to eager unseen.
    compiled = torch.compile(grouped_mm, dynamic=False, fullgraph=True)
    return Contestant("grouped_mm-compiled", lambda x, ids, w: compiled(x, ids, w, gate_up, down), (gate_up, down))


def _transformers(shape: Shape, gate_up: Tensor, down: Tensor) -> Contestant:
    """The experts of transformers 5 with its grouped_mm implementation: the module of Mixtral over our weights.

    Routing weights in bf16, as from the routers of OLMoE and Qwen3; in fp32 it would be slower.
    """
    modeling = _library("transformers.models.mixtral.modeling_mixtral")
    if not hasattr(modeling, "MixtralExperts"):
        raise Absent("transformers 5 or newer needed")
    config = _library("transformers").MixtralConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_experts, num_experts_per_tok=shape.top_k, experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device("meta"):
        experts = modeling.MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(gate_up.detach()), torch.nn.Parameter(down.detach())
    leaves = (experts.gate_up_proj, experts.down_proj)
    return Contestant("transformers", lambda x, ids, w: experts(x, ids, w.to(x.dtype)), leaves)


def _scattermoe(shape: Shape, gate_up: Tensor, down: Tensor) -> Contestant:
    """Two of its linear layers with the gather and the weighted scatter inside, and an eager SwiGLU, as in its MLPs."""
    library = _library("scattermoe.parallel_experts")

    def call(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        experts, rows, offsets = library.flatten_sort_count(ids_TK, num_experts=shape.num_experts)
        linear, where = library.parallel_linear, {
            "sorted_expert_idxs": experts, "sorted_scattered_idxs": rows, "expert_offsets": offsets,
        }  # fmt: skip
        h = linear(x_TD, gate_up.permute(0, 2, 1), k=shape.top_k, grouped_out=True, **where)
        gate, up = h.chunk(2, dim=-1)
        weights = weights_TK.to(x_TD.dtype)
        return linear(F.silu(gate) * up, down.permute(0, 2, 1), k=1, grouped_in=True, gates=weights, **where)

    return Contestant("scattermoe", call, (gate_up, down))


def _sonicmoe(shape: Shape, gate_up: Tensor, down: Tensor) -> Contestant:
    """Its entry for routing made elsewhere, with gate rows before up rows (`concat_layout`)."""
    library, functional = _library("sonicmoe.enums"), _library("sonicmoe.functional")

    def call(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        tokens = torch.arange(x_TD.shape[0], dtype=torch.int32, device=x_TD.device).repeat_interleave(shape.top_k)
        output, _ = functional.moe_general_routing_inputs(
            x_TD, weights_TK.reshape(-1), tokens, ids_TK.reshape(-1).int(),
            gate_up.permute(1, 2, 0), None, down.permute(1, 2, 0), None, shape.num_experts, None,
            library.ActivationType.SWIGLU, is_inference_mode_enabled=not torch.is_grad_enabled(), concat_layout=True,
        )  # fmt: skip
        return output

    return Contestant("sonicmoe", call, (gate_up, down))


def _liger(_shape: Shape, gate_up: Tensor, down: Tensor) -> Contestant:
    """Tunes itself for minutes at a new shape; with LIGER_FUSED_MOE_AUTOTUNE=0 in the environment it does not."""
    function = _library("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    return Contestant("liger", lambda x, ids, w: function.apply(x, gate_up, down, ids.int(), w), (gate_up, down))


def _megablocks(shape: Shape, gate_up: Tensor, down: Tensor) -> Contestant:
    """Its dropless experts in the "grouped" form. It keeps gate, up and down apart, all as [E * F, D]."""
    D, F_, E = shape.hidden_size, shape.intermediate_size, shape.num_experts
    arguments = _library("megablocks.layers.arguments").Arguments(
        hidden_size=D, ffn_hidden_size=F_, moe_num_experts=E, moe_top_k=shape.top_k, mlp_type="glu",
        mlp_impl="grouped", activation_fn=F.silu, bias=False, return_bias=False, device="meta", bf16=True, fp16=False,
    )  # fmt: skip
    layer = _library("megablocks.layers.dmoe").ParallelDroplessMLP(arguments)
    gate, up = (half.detach().reshape(E * F_, D).contiguous() for half in gate_up.chunk(2, dim=1))
    leaves = [torch.nn.Parameter(w) for w in (gate, up, down.detach().transpose(1, 2).reshape(E * F_, D).contiguous())]
    layer.mlp.w1, layer.mlp.v1, layer.mlp.w2 = leaves

    def call(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return layer(x_TD, weights_TK, weights_TK.to(x_TD.dtype), ids_TK)

    def gradients(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        d_gate, d_up, d_down = (g.view(E, F_, D) for g in grads)
        return torch.cat([d_gate, d_up], dim=1), d_down.transpose(1, 2)

    return Contestant("megablocks", call, leaves, gradients)


def _dense(shape: Shape, gate_up: Tensor, down: Tensor) -> Contestant:
    leaves = dense_weights(shape, gate_up.dtype, gate_up.device)
    return Contestant("dense", lambda x, ids, w: dense_swiglu(x, *leaves), leaves)


def _bmm(shape: Shape, gate_up: Tensor, down: Tensor) -> Limit:
    products = BalancedProducts(shape, gate_up, down)
    return Limit("bmm", products.forward, products.forward_backward)


def builders(device: torch.device) -> dict[str, Builder]:
    """Every implementation by name, the limits last."""
    ours: dict[str, Builder] = {f"dmoe-{name}": _ours(name) for name in fast_backends(device)}
    return ours | {
        "grouped_mm": _grouped_mm,
        "grouped_mm-compiled": _grouped_mm_compiled,
        "transformers": _transformers,
        "scattermoe": _scattermoe,
        "sonicmoe": _sonicmoe,
        "liger": _liger,
        "megablocks": _megablocks,
        "dense": _dense,
        "bmm": _bmm,
    }


def build(
    wanted: dict[str, Builder], shape: Shape, gate_up: Tensor, down: Tensor
) -> tuple[list[Contestant | Limit], dict[str, str]]:
    """Those that can be had, and for the others why not. Forgets what torch.compile has compiled."""
    torch.compiler.reset()
    contestants, absent = [], {}
    for name, builder in wanted.items():
        contestant, problem = attempt(lambda: builder(shape, gate_up, down))  # noqa: B023 (called at once)
        if problem:
            absent[name] = problem.removeprefix("Absent: ")
        else:
            contestants.append(contestant)
    return contestants, absent
