"""What OLMoE's training code needs around a MegaBlocks layer: configuration, losses, parameter groups and counts.

Source: Muennighoff et al., "OLMoE: Open Mixture-of-Experts Language Models", arXiv:2409.02060, and the field names of
its code. The layers themselves are `dmoe.compat.megablocks.layers.{dmoe.dMoE, moe.MoE}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config import require
from dmoe.errors import ConfigError
from dmoe.moe.sharded import is_plain

if TYPE_CHECKING:
    from dmoe.compat.megablocks.layers.arguments import Arguments

# activation_type -> function, and the factor by which OLMo shrinks the width that a gated pair of projections fills
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "swiglu": (F.silu, 0.5),
    "gelu": (F.gelu, 1.0),
    "relu": (F.relu, 1.0),
}
_EXPERT_WEIGHTS = ("w1", "w2", "v1")


def config_to_moe_args(config: Any) -> Arguments:
    """`Arguments` of a layer from OLMoE's model configuration, an object with its fields or a mapping of them.

    Read: d_model, n_layers, mlp_ratio or mlp_hidden_size, activation_type, include_bias, init_device, and
    moe_num_experts, moe_top_k, moe_mlp_impl, moe_capacity_factor, moe_loss_weight, moe_zloss_weight, moe_lbl_in_fp32,
    moe_shared_expert, moe_interleave. Fields that OLMoE gives a default may be missing. Without `moe_zloss_weight`
    there is no z-loss, whereas the MegaBlocks fork that OLMoE used then weighs it 0.001.

    Raises:
        ConfigError: a field without default is missing, or the activation is unknown.
    """
    from dmoe.compat.megablocks.layers.arguments import Arguments

    activation_type = str(_field(config, "activation_type", "swiglu")).lower()
    require(activation_type in _ACTIVATIONS, "activation_type", activation_type, f"one of {', '.join(_ACTIVATIONS)}")
    activation, multiplier = _ACTIVATIONS[activation_type]
    d_model, n_layers = _field(config, "d_model"), _field(config, "n_layers")
    width = _field(config, "mlp_hidden_size", None)
    if width is None:
        width = _field(config, "mlp_ratio") * d_model
    device = _field(config, "init_device", None)
    placement: dict[str, Any] = {} if device is None else {"device": torch.device(device)}
    return Arguments(
        activation_fn=activation,
        mlp_type="glu" if activation_type == "swiglu" else "mlp",
        mlp_impl=_field(config, "moe_mlp_impl", "sparse"),
        hidden_size=d_model,
        ffn_hidden_size=int(multiplier * width),
        moe_num_experts=_field(config, "moe_num_experts"),
        num_layers=n_layers // 2 if _field(config, "moe_interleave", False) else n_layers,
        moe_top_k=_field(config, "moe_top_k"),
        moe_capacity_factor=_field(config, "moe_capacity_factor", 1.25),
        moe_loss_weight=_field(config, "moe_loss_weight", 0.1),
        moe_zloss_weight=_field(config, "moe_zloss_weight", None) or 0,
        moe_lbl_in_fp32=_field(config, "moe_lbl_in_fp32", False),
        moe_expert_model_parallelism=False,  # OLMoE shards experts with FSDP
        moe_weight_parallelism=False,  # given at all, it asks for the fork's z-loss, see `Arguments`
        shared_expert=_field(config, "moe_shared_expert", False),
        bias=_field(config, "include_bias", False),
        return_bias=False,
        bf16=False,
        fp16=False,
        **placement,
    )


_REQUIRED = object()


def _field(config: Any, name: str, default: Any = _REQUIRED) -> Any:
    value = config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)
    if value is _REQUIRED:
        raise ConfigError(f"the OLMoE configuration has no field {name}: must have it, it has no default")
    return value


def moe_losses(args: Arguments) -> tuple[Tensor | float, Tensor | float]:
    """(load-balancing loss, router z-loss) of the forward passes since `clear_moe_losses`, weighted, to be added to the
    model's loss.

    With L = args.num_layers, T tokens on this rank, K picks each, E experts, and w the two weights of `args`:

        balancing  w E / (L T K) * sum over layers and experts of count_e * mean over tokens of score_e
        z-loss     w / (L T K) * sum over layers and tokens of logsumexp(logits)^2

    as in the MegaBlocks fork that trained OLMoE. The balancing loss is that of Fedus et al., arXiv:2101.03961, equation
    4, averaged over layers and divided by K; the z-loss that of Zoph et al., arXiv:2202.08906, equation 5, averaged
    and divided likewise. Each is 0.0 when its weight is 0. The losses are those of one micro-batch: divide them by the
    number of micro-batches of a step, and clear between them.

    Raises:
        ValueError: the number of forward passes is not the number of layers, for example because nothing was cleared.
    """
    from dmoe.compat.megablocks.layers import moe, router
    from dmoe.compat.megablocks.layers.arguments import uses_paired_zloss

    losses = moe.batched_load_balancing_loss(args)
    if uses_paired_zloss(args):
        return losses
    if not args.moe_zloss_weight:
        return losses, 0.0
    # `args` are not from config_to_moe_args: layers keep the means over their tokens
    return losses, torch.as_tensor(router.batched_router_zloss(args)).sum() / (args.num_layers * args.moe_top_k)


def clear_moe_losses() -> None:
    """Forget the forward passes that `moe_losses` reads. Once a micro-batch, or they keep their memory."""
    from dmoe.compat.megablocks.layers import moe, router

    moe.clear_load_balancing_loss()
    router.clear_router_zloss()


def param_groups(
    model: nn.Module, weight_decay: float, *, decay_norm_and_bias: bool = False, decay_embeddings: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: each parameter of `model` once, with or without weight decay.

    Decayed: weights of linear layers (routers among them) and the experts' w1, w2 and v1. Not decayed unless asked for:
    what has one dimension (norms, biases), and embeddings. A weight that an embedding and a linear layer share counts
    as the embedding's. OLMoE's published configurations set both arguments.

    Raises:
        ConfigError: a parameter is none of these; names it.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    for module_name, module, name, parameter in _own_parameters(model):
        if id(parameter) in embeddings:
            decay = decay_embeddings
        elif parameter.dim() <= 1 or name.endswith("bias"):
            decay = decay_norm_and_bias
        else:
            decay = isinstance(module, nn.Linear) or _is_expert_weight(module, name)
            require(
                decay, f"parameter {module_name}.{name} of a {type(module).__name__}", tuple(parameter.shape),
                "of nn.Linear, nn.Embedding or an expert MLP, or of one dimension: it is not known whether to decay it",
            )  # fmt: skip
        groups[decay].append(parameter)
    return [
        {"name": name, "params": groups[decay], "weight_decay": weight_decay if decay else 0.0}
        for name, decay in (("decay", True), ("no_decay", False))
        if groups[decay]
    ]


def num_params(model: nn.Module, *, include_embedding: bool = True, include_inactive_params: bool = True) -> int:
    """Parameters of `model` over all ranks of an expert-parallel group; works on the meta device.

    Args:
        include_embedding: also count nn.Embedding (a weight that it shares with a linear layer is the embedding's).
        include_inactive_params: False counts top_k of the experts, those that a token meets.
    """
    from dmoe.compat.megablocks.layers.moe import ParallelMLP

    args_of = {id(m.mlp): m.args for m in model.modules() if isinstance(m, ParallelMLP)}
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    total = 0
    for _, module, name, parameter in _own_parameters(model):
        if id(parameter) in embeddings and not include_embedding:
            continue
        count, args = parameter.numel(), args_of.get(id(module))
        if args is not None and name in _EXPERT_WEIGHTS:
            count = _numel_over_ranks(parameter, args)
            if not include_inactive_params:
                count = count // args.moe_num_experts * args.moe_top_k
        total += count
    return total


def _numel_over_ranks(parameter: Tensor, args: Arguments) -> int:
    from dmoe.compat.megablocks.layers import mpu

    # A DTensor counts what all ranks hold.
    return parameter.numel() * (mpu.get_expert_parallel_world_size(args) if is_plain(parameter) else 1)


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(module's name, module, parameter's name in it, parameter), each parameter once."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield module_name, module, name, parameter


def _is_expert_weight(module: nn.Module, name: str) -> bool:
    from dmoe.compat.megablocks.layers.mlp import MLP, SparseMLP

    return isinstance(module, (MLP, SparseMLP)) and name in _EXPERT_WEIGHTS
