"""`parallelize`: the list of what is done to a model, in order."""

from __future__ import annotations

import torch

from dmoe.config import ModelConfig, TrainConfig
from dmoe.models import Decoder
from dmoe.moe import MoE
from dmoe.parallel.context import apply_context_parallel
from dmoe.parallel.expert import apply_expert_parallel
from dmoe.parallel.fsdp import apply_fsdp
from dmoe.parallel.mesh import ParallelMesh, check_model
from dmoe.parallel.pipeline import split_stages
from dmoe.parallel.tensor import apply_tensor_parallel


def parallelize(
    config: ModelConfig,
    mesh: ParallelMesh,
    train: TrainConfig,
    *,
    dtype: torch.dtype = torch.float32,
    gather_dtype: torch.dtype | None = None,
) -> list[Decoder]:
    """This rank's parts of the model, on the meta device: one, or one for each pipeline stage that it holds.

    Args:
        dtype: of the weights.
        gather_dtype: in which experts and head are gathered; see `fsdp.apply_fsdp`.

    Raises:
        ConfigError: model, batch and layout do not fit; names the fields.
    """
    check_model(mesh.config, config, train)
    parts = split_stages(config, mesh)
    for part in parts:
        part.to(dtype)
        part.activation_checkpointing = train.activation_checkpointing
        apply_context_parallel(part, mesh)
        apply_tensor_parallel(part, mesh)
        apply_expert_parallel(part, mesh)
        if train.compile:
            compile_layers(part, whole=mesh.config.ep == 1 and mesh.data_axes(mesh.dense) is None)
        apply_fsdp(part, mesh, gather_dtype)
    return parts


def compile_layers(part: Decoder, *, whole: bool = True) -> None:
    """torch.compile each layer. Layers are alike: one is compiled and the others reuse it.

    Args:
        whole: in one graph. False compiles attention and the mixture of experts, without the experts and the way of the
            tokens to them (`MoE.leave_experts_uncompiled`): what FSDP gathers inside a graph would lose its gradients.
    """
    for layer in part.blocks:
        if whole or not isinstance(layer.mlp, MoE):
            layer.compile(fullgraph=True)
        else:
            layer.compile_around_experts()
