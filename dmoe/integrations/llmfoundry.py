"""llm-foundry's feed-forward blocks `mb_moe` and `mb_dmoe`: configuration, expert-parallel mesh, construction.

llm-foundry hands a block's `ffn_config` to MegaBlocks' `Arguments`, builds the layer, spreads its experts over the
mesh (weight_parallel, expert_parallel) as DTensors, and leaves marks by which its initialisation and its FSDP know the
layer. The same here, for any type of device. Initialisation is in `dmoe.integrations.llmfoundry_init`.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config import require
from dmoe.errors import ConfigError
from dmoe.integrations.llmfoundry_init import init_fused_or_stacked, init_mb_ffn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from dmoe.compat.megablocks.layers.arguments import Arguments

__all__ = ["build_mb_ffn", "build_moe_mesh", "init_fused_or_stacked", "init_mb_ffn", "mb_arguments"]

FFN_TYPES = ("mb_moe", "mb_dmoe")
# Keys of an ffn_config that are llm-foundry's own: no field of Arguments, and not meant to be one.
FOUNDRY_KEYS = ("ffn_type", "fc_type", "ffn_act_fn", "moe_world_size", "device_mesh", "lbl_process_group")
# Fields of Arguments that this module fills in itself.
DERIVED_KEYS = ("hidden_size", "device", "activation_fn", "bias", "expert_parallel_group")


def build_moe_mesh(moe_world_size: int, *, device_type: str | None = None, world_size: int | None = None) -> DeviceMesh:
    """The mesh ("weight_parallel", "expert_parallel"), world_size / moe_world_size x moe_world_size ranks. Collective.

    Build it once and give it to every layer: each mesh makes process groups of its own.

    Args:
        moe_world_size: ranks over which the experts of a layer are spread.
        device_type: None: that of the default process group's devices, "cuda" for nccl, "cpu" for gloo alone.
        world_size: ranks in the mesh, None for all.
    """
    from torch.distributed.device_mesh import init_device_mesh

    require(dist.is_initialized(), "torch.distributed", "not initialised", "initialised: call init_process_group first")
    world_size = dist.get_world_size() if world_size is None else world_size
    require(
        moe_world_size >= 1 and world_size % moe_world_size == 0, "moe_world_size", moe_world_size,
        f"a divisor of the number of ranks ({world_size})",
    )  # fmt: skip
    if device_type is None:
        device_type = "cuda" if "nccl" in dist.get_backend() else "cpu"
    shape = (world_size // moe_world_size, moe_world_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("weight_parallel", "expert_parallel"))


def mb_arguments(
    d_model: int,
    *,
    expansion_ratio: float = 4,
    ffn_hidden_size: int | None = None,
    ffn_config: Mapping[str, Any] | None = None,
    ffn_act_fn: Mapping[str, Any] | Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str | None = None,
    device_mesh: DeviceMesh | None = None,
    bias: bool = True,
) -> Arguments:
    """The `Arguments` of a block; the parameters are those of `build_mb_ffn`.

    One is enough for the losses of a whole model: `batched_load_balancing_loss(args)` reads numbers alone.
    """
    from dmoe.compat.megablocks.layers.arguments import Arguments

    config = dict(ffn_config or {})
    known = [name for name in inspect.signature(Arguments).parameters if name not in DERIVED_KEYS]
    _check_keys(config, known)
    foundry = {name: config.pop(name) for name in FOUNDRY_KEYS if name in config}
    if foundry.get("lbl_process_group") is not None:
        warnings.warn(
            "ffn_config.lbl_process_group has no effect: the load-balancing loss is that of each rank's tokens",
            stacklevel=2,
        )
    config.setdefault("fp16", False)
    config.setdefault("bf16", False)
    require(
        not config.setdefault("return_bias", False), "ffn_config.return_bias", config["return_bias"],
        "False: a block adds the layer's output to its residual, and an output with a bias beside it is no tensor",
    )  # fmt: skip
    group = _expert_parallel_group(foundry, device_mesh)
    if ffn_hidden_size is None:
        ffn_hidden_size = config.get("ffn_hidden_size")
    config["ffn_hidden_size"] = _ffn_hidden_size(d_model, expansion_ratio, ffn_hidden_size)

    args = Arguments(hidden_size=d_model, **config)
    # llm-foundry sets these on the finished object, so it can be shared by blocks that differ in them.
    args.bias = bias
    args.device = device
    if group is not None:
        args.moe_expert_model_parallelism = True
        args.expert_parallel_group = group
    activation = foundry.get("ffn_act_fn") if ffn_act_fn is None else ffn_act_fn
    if activation is not None:
        args.activation_fn = _activation(activation)
    return args


def build_mb_ffn(
    ffn_type: str,
    d_model: int,
    *,
    expansion_ratio: float = 4,
    ffn_hidden_size: int | None = None,
    ffn_config: Mapping[str, Any] | None = None,
    ffn_act_fn: Mapping[str, Any] | Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str | None = None,
    device_mesh: DeviceMesh | None = None,
    bias: bool = True,
) -> nn.Module:
    """Build the block that llm-foundry builds for `ffn_type` "mb_moe" (capacity) or "mb_dmoe" (dropless).

    Over a mesh the experts' parameters are DTensors, Shard(0) over "expert_parallel". What remains to the caller:
    averaging gradients, of the experts over "weight_parallel" and of all else over every rank. `experts` carries
    `_fsdp_kwargs_dict`, whose mesh FSDP takes for that; DDP takes `device_mesh["weight_parallel"].get_group()`.
    The gradient of `experts.bias`, which every rank holds, is averaged over "expert_parallel" in the backward.

    Args:
        d_model: width of the block's input and output [..., d_model].
        expansion_ratio: ffn_hidden_size / d_model, if neither `ffn_hidden_size` nor `ffn_config` gives the former.
        ffn_hidden_size: F, width of one expert.
        ffn_config: fields of `Arguments`, and llm-foundry's own keys. `fp16` and `bf16` are False unless given: the
            parameters then have the default dtype. `num_layers` is the number of these blocks in the model.
        ffn_act_fn: {"name": function of torch.nn.functional or "quick_gelu", **its keywords}, or a function. None: the
            default of `activation_fn`, tanh-approximated GELU.
        device: of the parameters, "meta" too.
        device_mesh: from `build_moe_mesh`; needed when `moe_world_size` in `ffn_config` is more than 1.
        bias: one bias [d_model] on the output, and biases in a shared expert.

    Raises:
        ConfigError: a key is unknown, or sizes do not fit. llm-foundry drops unknown keys.
    """
    from dmoe.compat.megablocks.layers.dmoe import dMoE
    from dmoe.compat.megablocks.layers.moe import MoE

    require(ffn_type in FFN_TYPES, "ffn_type", ffn_type, f"one of {', '.join(FFN_TYPES)}")
    args = mb_arguments(
        d_model, expansion_ratio=expansion_ratio, ffn_hidden_size=ffn_hidden_size, ffn_config=ffn_config,
        ffn_act_fn=ffn_act_fn, device=device, device_mesh=device_mesh, bias=bias,
    )  # fmt: skip
    group = args.expert_parallel_group
    num_ranks = 1 if group is None else group.size()
    require(
        args.moe_num_experts % num_ranks == 0, "ffn_config.moe_num_experts", args.moe_num_experts,
        f"a multiple of the {num_ranks} ranks of expert_parallel: DTensors over whole experts only",
    )  # fmt: skip
    ffn: Any = MoE(args) if ffn_type == "mb_moe" else dMoE(args)
    mlp = ffn.experts.mlp
    mlp.hidden_size = args.ffn_hidden_size  # llm-foundry's name for it
    mlp.expert_parallel_group = group
    if ffn_type == "mb_moe":
        mlp._stack_dim = 0
    else:
        mlp._fused = (0, [n * args.ffn_hidden_size for n in range(1, args.moe_num_experts // num_ranks)])
    if num_ranks > 1:
        assert device_mesh is not None
        _spread_experts(ffn, device_mesh)
    return ffn


def _spread_experts(ffn: Any, device_mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import DTensor, Shard

    from dmoe.compat.megablocks.layers import mpu

    mlp = ffn.experts.mlp
    for name, local in list(mlp.named_parameters()):
        spread = DTensor.from_local(local.detach(), device_mesh["expert_parallel"], [Shard(0)], run_check=False)
        parameter = nn.Parameter(spread, requires_grad=local.requires_grad)
        mpu.copy_expert_model_parallel_attributes(parameter, local)
        mlp.register_parameter(name, parameter)
    ffn.experts._fsdp_kwargs_dict = {"device_mesh": device_mesh["weight_parallel"]}
    if isinstance(ffn.experts.bias, nn.Parameter):
        ffn.experts.register_forward_pre_hook(_watch_bias)


def _watch_bias(experts: Any, inputs: tuple[Any, ...]) -> None:
    """Average the gradient of the bias over the ranks that share its experts.

    They see different tokens, so their gradients differ, and what averages those of the experts does not span them. In
    each forward, because FSDP and `to_empty` put other tensors in the parameter's place.
    """
    bias = experts.bias
    if torch.is_grad_enabled() and bias.requires_grad and not getattr(bias, "_averaged", False):
        bias.register_hook(partial(_average, experts.args.expert_parallel_group))
        bias._averaged = True


def _average(group: dist.ProcessGroup, gradient: Tensor) -> Tensor:
    average = gradient / group.size()
    dist.all_reduce(average, group=group)
    return average


def _check_keys(config: Mapping[str, Any], known: list[str]) -> None:
    for name in config:
        if name in DERIVED_KEYS:
            raise ConfigError(f"ffn_config.{name} is set: must be left out, build_mb_ffn has a parameter for it")
        if name not in known and name not in FOUNDRY_KEYS:
            nearest = difflib.get_close_matches(name, [*known, *FOUNDRY_KEYS], n=1, cutoff=0.0)
            raise ConfigError(f"ffn_config.{name} is no field of Arguments: the nearest is {nearest[0]!r}")


def _expert_parallel_group(foundry: Mapping[str, Any], mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """The group over which experts are spread, None for one rank; checks mesh and `moe_world_size` on each other."""
    sizes = foundry.get("device_mesh")
    if sizes is not None:
        require(len(sizes) == 1, "ffn_config.device_mesh", sizes, "one number, the ranks: no HSDP with experts")
    if mesh is None:
        size = foundry.get("moe_world_size", 1)
        require(size == 1, "ffn_config.moe_world_size", size, f"1 without device_mesh, build_moe_mesh({size})")
        return None
    names = tuple(mesh.mesh_dim_names or ())
    wanted = ("weight_parallel", "expert_parallel")
    require(names == wanted, "axes of device_mesh", names, f"{wanted}, as from build_moe_mesh")
    size = foundry.get("moe_world_size", mesh["expert_parallel"].size())
    require(
        size == mesh["expert_parallel"].size(), "ffn_config.moe_world_size", size,
        f"the size of the mesh's expert_parallel ({mesh['expert_parallel'].size()})",
    )  # fmt: skip
    if sizes is not None:
        require(sizes[0] == mesh.size(), "ffn_config.device_mesh", sizes, f"[{mesh.size()}], the ranks of the mesh")
    return mesh.get_group("expert_parallel") if size > 1 else None


def _ffn_hidden_size(d_model: int, expansion_ratio: float, ffn_hidden_size: int | None) -> int:
    if ffn_hidden_size is not None:
        return ffn_hidden_size
    size = d_model * expansion_ratio
    require(size == int(size), "expansion_ratio", expansion_ratio, f"such that d_model ({d_model}) times it is whole")
    return int(size)


def _activation(config: Mapping[str, Any] | Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    if callable(config):
        return config
    keywords = dict(config)
    name = keywords.pop("name", None)
    function = quick_gelu if name == "quick_gelu" else getattr(F, name, None) if isinstance(name, str) else None
    require(
        callable(function), "ffn_act_fn.name", name,
        'a function of torch.nn.functional, such as "silu", or "quick_gelu"',
    )  # fmt: skip
    assert function is not None
    return partial(function, **keywords) if keywords else function


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): Hendrycks and Gimpel, arXiv:1606.08415, section 2."""
    return x * torch.sigmoid(1.702 * x)
