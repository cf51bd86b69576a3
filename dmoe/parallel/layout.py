"""`parallelize`: the list of what is done to a model, in order."""

from __future__ import annotations

import torch

from dmoe.config import ModelConfig, TrainConfig
from dmoe.models import Decoder
from dmoe.moe import MoE
from dmoe.parallel.context import apply_context_parallel
from dmoe.parallel.expert import apply_expert_parallel
from dmoe.parallel.fsdp import apply_fsdp
from dmoe.parallel.mesh import ParallelMesh, check_model, recent_torch
from dmoe.parallel.pipeline import split_stages
from dmoe.parallel.tensor import apply_tensor_parallel


def parallelize(
    config: ModelConfig,
    mesh: ParallelMesh,
    train: TrainConfig,
    *,
    dtype: torch.dtype = torch.float32,
    expert_dtype: torch.dtype | None = None,
) -> list[Decoder]:
    """This rank's parts of the model, on the meta device: one, or one for each pipeline stage that it holds.

    Args:
        dtype: of the weights.
        expert_dtype: in which experts are gathered; see `fsdp.apply_fsdp`.

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
            spread = mesh.config.ep > 1
            experts = mesh.data_axes(mesh.experts if spread else mesh.dense)
            compile_layers(part, whole=experts is None and (recent_torch() or not spread))
        apply_fsdp(part, mesh, expert_dtype)
    return parts


def compile_layers(part: Decoder, *, whole: bool = True) -> None:
    """torch.compile each layer, or its attention alone. Layers are alike: one is compiled and the others reuse it.

    Args:
        whole: False where FSDP gathers the experts, which inside a graph would lose their gradients, and where torch
            compiles an exchange wrongly (`recent_torch`).
    """
    # The counts of an exchange are read inside the graph.
    torch._dynamo.config.capture_scalar_outputs = True
    for layer in part.blocks:
        module = layer if whole or not isinstance(layer.mlp, MoE) else layer.self_attn
        module.compile(fullgraph=True)
