"""`Arguments`: every setting of a MegaBlocks layer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dmoe.config import require
from dmoe.errors import ConfigError

InitFn = Callable[[Tensor], Any]
"""Fills a tensor in place."""

DEFAULT_ACTIVATION_FN = partial(F.gelu, approximate="tanh")
_DEFAULT_INIT = partial(torch.nn.init.normal_, mean=0.0, std=0.02)


def _default_device() -> int | torch.device:
    return torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu")


@dataclasses.dataclass
class Arguments:
    """The fields of MegaBlocks 0.5 to main and of the fork that OLMoE uses, with the defaults of main.

    Mutable, and read at each forward: consumers set fields after construction. What decides the parameters (sizes,
    dtype, device, parallelism, `mlp_type`) is read when a layer is made.

    Raises:
        ConfigError: see `check`, which layers repeat.
    """

    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_layers: int = 1
    """MoE layers of the whole model; only the load-balancing loss reads it."""
    bias: bool = True
    """One bias [hidden_size], added after the experts' outputs are summed."""
    return_bias: bool = True
    """Layers return (out, bias) and do not add the bias."""
    activation_fn: Callable[..., Tensor] | None = DEFAULT_ACTIVATION_FN
    """Any elementwise function. See `layers.expert_compute` for those that run in the fused kernels."""

    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_capacity_factor: float = 1
    """Of `MoE`; an expert takes at most factor * top_k * tokens / experts picks. 0: as many as come."""
    moe_normalize_expert_weights: int | float | None = None
    """p of the p-norm that a token's weights are divided by."""
    moe_loss_weight: float = 0.1
    moe_jitter_eps: float | None = None
    """The router's input is multiplied by uniform noise in [1 - eps, 1 + eps] while training."""
    moe_lbl_in_fp32: bool = False

    moe_expert_model_parallelism: bool = False
    expert_parallel_group: dist.ProcessGroup | None = None
    """None: all ranks."""
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None

    memory_optimized_mlp: bool = False
    mlp_type: str = "mlp"
    """Or "glu", of `dMoE` and of shared experts: act(x w1) * (x v1) in place of act(x w1)."""
    mlp_impl: str = "grouped"
    """Or "sparse": the same computation here."""

    fp16: bool = True
    bf16: bool = False
    """Counts only with `fp16=False`."""
    device: int | str | torch.device | None = dataclasses.field(default_factory=_default_device)
    init_method: InitFn = _DEFAULT_INIT
    output_layer_init_method: InitFn = _DEFAULT_INIT

    uniform_expert_assignment: bool = False
    """For benchmarks: picks go to the experts in turn, whatever the router says; the weights stay the router's."""

    shared_expert: bool = False
    fc_cls: Any = torch.nn.Linear
    fc_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """For `fc_cls`, over bias and device; the shared expert has the default dtype unless this says otherwise."""
    remat_act_fn: bool = True
    """Read nowhere."""
    shared_expert_hidden_size: int | None = None
    """None becomes `ffn_hidden_size`."""
    shared_expert_weighted_sum: bool = False
    """Average the top_k experts and the shared one, instead of adding."""

    moe_zloss_weight: float = 0
    moe_zloss_in_fp32: bool = False

    # Fields of releases before 0.6.
    moe_weight_parallelism: bool | None = None
    """True is not supported. Given at all, it marks code for the fork of OLMoE: see `uses_paired_zloss`."""
    weight_parallel_group: dist.ProcessGroup | None = None
    quantize_inputs_num_bits: int = -1
    quantize_rematerialize_num_bits: int = -1
    quantize_scatter_num_bits: int = -1
    grouped_mlp: bool = False
    """The name of `mlp_impl="grouped"` in 0.5.0; without effect."""

    # Fields of the fork.
    moe_expert_choice: bool = False
    """Experts choose tokens: in each sequence the top_k * tokens / experts of highest score."""
    moe_expert_choice_grouped: bool = False
    """The same over all sequences of the batch."""

    def __post_init__(self) -> None:
        if self.shared_expert_hidden_size is None:
            self.shared_expert_hidden_size = self.ffn_hidden_size
        if self.fp16 and self.bf16:
            warnings.warn(
                "Arguments: fp16 is True, its default, and bf16 is True: fp16 wins and parameters are float16. "
                "Pass fp16=False for bfloat16.",
                stacklevel=3,
            )
        check(self)


def uses_expert_choice(args: Arguments) -> bool:
    """Whether experts choose tokens, in the one or the other way."""
    return args.moe_expert_choice or args.moe_expert_choice_grouped


def uses_paired_zloss(args: Arguments) -> bool:
    """Whether the z-loss follows the fork of OLMoE: saved and returned together with the load-balancing loss.

    So it is when there is one and `moe_weight_parallelism`, a field that only that fork has beside a z-loss, was given.
    Else it is main's: kept by the router, `batched_router_zloss`.
    """
    return bool(args.moe_zloss_weight) and args.moe_weight_parallelism is not None


def check(args: Arguments) -> None:
    """Refuse what this implementation does not have. Fields may have changed since `args` was made.

    Raises:
        ConfigError: names the field.
    """
    require(args.mlp_type in ("mlp", "glu"), "mlp_type", args.mlp_type, "'mlp' or 'glu'")
    require(args.mlp_impl in ("grouped", "sparse"), "mlp_impl", args.mlp_impl, "'grouped' or 'sparse'")
    experts, top_k = args.moe_num_experts, args.moe_top_k
    require(experts >= 1, "moe_num_experts", experts, "at least 1")
    require(1 <= top_k <= experts, "moe_top_k", top_k, f"from 1 to moe_num_experts, {experts}")
    if args.moe_weight_parallelism:
        raise ConfigError(
            "moe_weight_parallelism is True: must be False; to spread the weights of an expert over ranks, "
            "wrap the model with torch.distributed.fsdp.fully_shard"
        )
    for name in ("quantize_inputs_num_bits", "quantize_rematerialize_num_bits", "quantize_scatter_num_bits"):
        require(
            getattr(args, name) == -1, name, getattr(args, name), "-1: tensors kept for the backward stay as they are"
        )
    if uses_expert_choice(args):
        both = args.moe_expert_choice and args.moe_expert_choice_grouped
        require(not both, "moe_expert_choice_grouped", True, "False with moe_expert_choice")
        for name in ("moe_expert_model_parallelism", "uniform_expert_assignment"):
            require(not getattr(args, name), name, getattr(args, name), "False when experts choose tokens")


def from_megatron(megatron_args: Any) -> Arguments:
    """`Arguments` with every field that `megatron_args` has, by name; the others keep their defaults.

    Args:
        megatron_args: the namespace of Megatron's argument parser.

    Raises:
        ConfigError: see `Arguments`.
    """
    given = {
        f.name: getattr(megatron_args, f.name) for f in dataclasses.fields(Arguments) if hasattr(megatron_args, f.name)
    }
    return Arguments(**given)
