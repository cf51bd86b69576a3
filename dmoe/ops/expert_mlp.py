"""`expert_mlp`: the expert computation of a mixture of experts as one function over swappable backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmoe.errors import ConfigError
from dmoe.ops.activations import ACTIVATIONS
from dmoe.ops.fp8 import expert_mlp_fp8
from dmoe.ops.grouped import expert_mlp_grouped
from dmoe.ops.platform import runs_triton
from dmoe.ops.precision import allows_tf32, autocast_dtype, autocast_off, in_autocast
from dmoe.ops.reference import expert_mlp_reference


def _expert_mlp_triton(*args: Any, **options: Any) -> Tensor:
    from dmoe.ops.triton_experts import expert_mlp_triton  # Triton is imported when it is needed

    return expert_mlp_triton(*args, **options)


BACKENDS = {"reference": expert_mlp_reference, "torch": expert_mlp_grouped, "triton": _expert_mlp_triton}


def choose_backend(x: Tensor) -> str:
    """Backend that `backend=None` stands for.

    "triton" on NVIDIA GPUs that run its kernels, for bf16 and fp16, and for fp32 if products through tf32 are allowed
    (`dmoe.ops.precision.allows_tf32`); "reference" for fp64, which the others do not have; else "torch".
    """
    if x.dtype == torch.float64:
        return "reference"
    if x.device.type != "cuda" or torch.version.hip is not None or not runs_triton(x.device):
        return "torch"
    return "torch" if x.dtype == torch.float32 and not allows_tf32() else "triton"


def _fail(name: str, got: object, wanted: str) -> None:
    raise ConfigError(f"expert_mlp: {name} is {got}: must be {wanted}")


def _check_shapes(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:  # fmt: skip
    if x.dim() != 2:
        _fail("x_TD", f"of shape {tuple(x.shape)}", "[tokens, width]")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.shape != weights.shape:
        _fail(
            "topk_ids_TK", f"of shape {tuple(ids.shape)} (topk_weights_TK: {tuple(weights.shape)})",
            f"[{x.shape[0]}, K] like topk_weights_TK",
        )  # fmt: skip
    width = x.shape[1]
    if down.dim() != 3 or down.shape[1] != width or 0 in (down.shape[0], down.shape[2]):
        _fail("down_proj", f"of shape {tuple(down.shape)}", f"[E, {width}, F], E and F at least 1")
    num_experts, _, expert_width = down.shape
    if gate_up.shape not in ((num_experts, 2 * expert_width, width), (num_experts, expert_width, width)):
        _fail(
            "gate_up_proj", f"of shape {tuple(gate_up.shape)}",
            f"[{num_experts}, {2 * expert_width}, {width}] (gated) or [{num_experts}, {expert_width}, {width}]",
        )  # fmt: skip
    for name, bias, shape in (
        ("gate_up_bias", gate_up_bias, gate_up.shape[:2]),
        ("down_bias", down_bias, down.shape[:2]),
    ):
        if bias is not None and bias.shape != shape:
            _fail(name, f"of shape {tuple(bias.shape)}", f"{list(shape)}")


def _check_dtypes(x: Tensor, ids: Tensor, weights: Tensor, parameters: dict[str, Tensor | None]) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        _fail("x_TD", x.dtype, "float32, bfloat16, float16 or float64")
    if ids.dtype not in (torch.int64, torch.int32):
        _fail("topk_ids_TK", ids.dtype, "int64 or int32")
    if not weights.dtype.is_floating_point:
        _fail("topk_weights_TK", weights.dtype, "a floating-point dtype")
    for name, parameter in parameters.items():
        if parameter is not None and parameter.dtype != x.dtype:
            _fail(name, parameter.dtype, f"{x.dtype}, the dtype of x_TD")


def _check_choices(x: Tensor, activation: str, gated: bool, backend: str) -> None:
    if activation not in ACTIVATIONS:
        _fail("activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
    if activation == "clamped_swiglu" and not gated:
        _fail("activation", "'clamped_swiglu' with plain experts", "used with gated experts, gate_up_proj [E, 2F, D]")
    if backend not in BACKENDS:
        _fail("backend", repr(backend), f"one of {', '.join(BACKENDS)}")
    if backend != "reference" and x.dtype == torch.float64:
        _fail("backend", f"{backend!r} for an fp64 input", "'reference' (matrix products by groups have no fp64)")
    if backend == "triton" and not runs_triton(x.device):
        _fail(
            "backend", f"'triton' for an input on {x.device}",
            "'torch' or None: it needs Triton and a C compiler, and a GPU (compute capability 8.0) or the interpreter",
        )  # fmt: skip


def expert_mlp(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    backend: str | None = None,
    precision: str = "same",
    num_rows: int | None = None,
) -> Tensor:
    """y_t = sum over k of weight[t, k] * MLP_{id[t, k]}(x_t), for every token, however skewed the routing.

    A pick with the id E (the number of experts) is of no expert: a token over capacity, or padding. It is not computed
    and takes no row of a matrix product. It adds 0 to the output and to every gradient, its routing weight gets the
    gradient 0, and what that weight is, or the token of which all picks are so, or its gradient, finite or not, changes
    nothing. A token may have several such picks.

    Args:
        x_TD: [T, D] tokens; T may be 0. fp32, bf16, fp16; fp64 with the reference backend.
        topk_ids_TK: [T, K] int64 or int32, distinct expert ids in [0, E) within a row, and E for no expert. Not
            checked: that would synchronise with the device.
        topk_weights_TK: [T, K] routing weights, applied once, in fp32.
        gate_up_proj: [E, 2F, D], rows gate then up, for gated experts; [E, F, D] for plain ones. The shape decides.
        down_proj: [E, D, F].
        gate_up_bias, down_bias: [E, 2F] or [E, F], and [E, D]. All weights have the dtype of `x_TD`.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", or "clamped_swiglu" (gated, gpt-oss).
        backend: "reference", "torch", "triton" or None: by device and dtype, see `choose_backend`.
        precision: "same", or "fp8": operands of the projections and of their data gradients are rounded to 8 bits, see
            `dmoe.ops.fp8`. It has one implementation: `backend` stays None.
        num_rows: how many of the picks are of an expert, if the caller knows. With many that are not, it saves a GPU
            the memory of their rows. A wrong number gives wrong results.

    Returns:
        [T, D] in the dtype of `x_TD`; under autocast in the autocast dtype, to which inputs and weights are cast.
        Differentiable in x, topk_weights, both projections and both biases. No host synchronisation on a GPU, but
        with backend "torch" for fp32 and fp16 there: torch's grouped_mm has a kernel for bf16 alone and itself reads
        the group sizes back for the others.

    Raises:
        ConfigError: a shape or dtype does not fit, or the activation or backend is unknown; names the argument.
    """
    if in_autocast(x_TD):  # a tensor that has the dtype already stays as it is
        dtype = autocast_dtype(x_TD)
        x_TD, gate_up_proj, down_proj = (t.to(dtype) for t in (x_TD, gate_up_proj, down_proj))
        gate_up_bias = None if gate_up_bias is None else gate_up_bias.to(dtype)
        down_bias = None if down_bias is None else down_bias.to(dtype)
    if precision not in ("same", "fp8"):
        _fail("precision", repr(precision), "one of same, fp8")
    if precision == "fp8" and backend is not None:
        _fail("backend", repr(backend), 'None with precision "fp8"')
    backend = backend or choose_backend(x_TD)
    _check_shapes(x_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj, gate_up_bias, down_bias)
    parameters = {
        "gate_up_proj": gate_up_proj,
        "down_proj": down_proj,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
    }
    _check_dtypes(x_TD, topk_ids_TK, topk_weights_TK, parameters)
    _check_choices(x_TD, activation, gate_up_proj.shape[1] == 2 * down_proj.shape[2], backend)
    run: Callable[..., Tensor] = BACKENDS[backend] if precision == "same" else expert_mlp_fp8
    options = {} if num_rows is None or backend == "reference" or precision != "same" else {"num_rows": num_rows}
    with autocast_off(x_TD):
        return run(
            x_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj, gate_up_bias, down_bias, activation, **options
        )  # fmt: skip
