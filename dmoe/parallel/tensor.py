"""Tensor parallel (Shoeybi et al., "Megatron-LM", arXiv:1909.08053) with sequence parallel (Korthikanti et al.,
arXiv:2205.05198): heads, widths and vocabulary over "tp"; between the layers the sequence.

A MoE layer always takes a part of the tokens on each rank. Its shared expert is split like a dense network; its routed
experts are split by width if ep is 1, and otherwise left to expert parallelism.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from dmoe.models import Attention, Decoder
from dmoe.models.decoder import DecoderLayer
from dmoe.moe import Experts, MoE
from dmoe.moe.dispatch import TensorParallelDispatcher
from dmoe.parallel.mesh import ParallelMesh

SEQUENCE = Shard(1)


def apply_tensor_parallel(part: Decoder, mesh: ParallelMesh) -> None:
    """Split a part over "tp" in place. With loss parallel the logits are this rank's part of the vocabulary."""
    axis = mesh.dense["tp"]
    if axis.size() == 1:
        return
    between: Placement = SEQUENCE if mesh.config.sequence_parallel else Replicate()
    for layer in part.blocks:
        _split_layer(layer, axis, between, by_width=mesh.config.ep == 1)
    plan: dict[str, ParallelStyle] = {}
    if part.is_first:
        plan["embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    if part.is_last:
        plan |= _norm("norm", between)
        logits: Placement = Shard(-1) if mesh.config.loss_parallel else Replicate()
        plan["lm_head"] = ColwiseParallel(input_layouts=between, output_layouts=logits)
    parallelize_module(part, axis, plan)
    if part.is_last and not part.is_first and part.config.tie_embeddings:
        weight = distribute_tensor(part.embed_tokens.weight.detach(), axis, [Shard(0)], src_data_rank=None)
        part.embed_tokens.weight = nn.Parameter(weight)
    part.tie_weights()
    size, rank = axis.size(), axis.get_local_rank()
    part.moe_columns = partial(_columns, size=size, rank=rank)
    if isinstance(between, Shard):
        _positions_of_whole_sequence(part, size)


def _columns(columns_BS: Tensor, size: int, rank: int) -> Tensor:
    return columns_BS.chunk(size, dim=1)[rank]


def _split_layer(layer: DecoderLayer, axis: DeviceMesh, between: Placement, *, by_width: bool) -> None:
    plan: dict[str, ParallelStyle] = {
        **_norm("input_layernorm", between),
        "self_attn": PrepareModuleInput(
            input_layouts=(between, None, None),  # hidden states, tables of positions, mask
            desired_input_layouts=(Replicate(), None, None),
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=between),
        **_norm("post_attention_layernorm", between),
    }
    qk_norm = layer.self_attn.config.qk_norm
    for name in ("q_norm", "k_norm") if qk_norm in ("head", "full") else ():
        # Over one head: heads are spread like a sequence. Over all heads at once: they must be brought together.
        plan[f"self_attn.{name}"] = (
            SequenceParallel(sequence_dim=2, use_local_output=True) if qk_norm == "head" else (_WholeWidthNorm())
        )
    if isinstance(layer.mlp, MoE):
        if not isinstance(between, Shard):
            plan["mlp"] = PrepareModuleInputOutput(
                input_layouts=between, desired_input_layouts=SEQUENCE, use_local_input=True,
                output_layouts=SEQUENCE, desired_output_layouts=between,
            )  # fmt: skip
        if layer.mlp.shared_experts is not None:
            plan |= _feed_forward("mlp.shared_experts", layer.mlp.shared_experts, Shard(0))
    else:
        plan |= _feed_forward("mlp", layer.mlp, between)
    parallelize_module(layer, axis, plan)
    if isinstance(layer.self_attn, Attention) and layer.self_attn.sinks is not None:
        layer.self_attn.sinks = _spread(layer.self_attn.sinks, axis, Shard(0))
    if isinstance(layer.mlp, MoE):
        _split_moe(layer.mlp, axis, by_width=by_width)


def _norm(name: str, between: Placement) -> dict[str, ParallelStyle]:
    """Norms see a part of the sequence; where every rank has all of it they stay as they are."""
    return {name: SequenceParallel(use_local_output=True)} if isinstance(between, Shard) else {}


def _feed_forward(name: str, module: nn.Module, outside: Placement) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        name: PrepareModuleInput(input_layouts=outside, desired_input_layouts=Replicate()),
        f"{name}.up_proj": ColwiseParallel(),
        f"{name}.down_proj": RowwiseParallel(output_layouts=outside),
    }
    if getattr(module, "gate_proj", None) is not None:
        plan[f"{name}.gate_proj"] = ColwiseParallel()
    return plan


def _split_moe(layer: MoE, axis: DeviceMesh, *, by_width: bool) -> None:
    # Every rank applies them to tokens of its own.
    for module in (layer.router, layer.shared_expert_gate, layer.fc1_latent_proj, layer.fc2_latent_proj):
        for name, parameter in [] if module is None else list(module.named_parameters(recurse=False)):
            setattr(module, name, _spread(parameter, axis, Replicate()))
    if not by_width:
        return
    # Each rank has its part of the gate rows and the same part of the up rows.
    up: Placement = _StridedShard(1, split_factor=2) if layer.config.gated else Shard(1)
    placements = {"gate_up_proj": up, "up_proj": up, "gate_up_bias": up, "up_bias": up,
                  "down_proj": Shard(2), "down_bias": Replicate()}  # fmt: skip
    experts: Experts = layer.experts
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, _spread(parameter, axis, placements[name]))
    experts.adds_down_bias = axis.get_local_rank() == 0
    layer.dispatcher = TensorParallelDispatcher(axis.get_group())


def _spread(parameter: Tensor, axis: DeviceMesh, placement: Placement) -> nn.Parameter:
    """A parameter as a DTensor; values, if it has any, are kept."""
    data = parameter.detach()
    factor = getattr(placement, "split_factor", 1)
    if not isinstance(placement, Replicate):
        halves = data.unflatten(placement.dim, (factor, -1))  # type: ignore[attr-defined]
        dim = placement.dim  # type: ignore[attr-defined]
        data = halves.chunk(axis.size(), dim + 1)[axis.get_local_rank()].flatten(dim, dim + 1).contiguous()
    spread = DTensor.from_local(
        data, axis, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(spread, requires_grad=parameter.requires_grad)


class _WholeWidthNorm(ParallelStyle):
    """A norm over a width that is split over ranks: gathered, normalised on every rank, cut again."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # What the hooks return replaces inputs and output, though torch declares that they return nothing.
        def gather(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return DTensor.from_local(inputs[0], mesh, [Shard(-1)], run_check=False).redistribute(
                placements=[Replicate()]
            )

        def cut(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.redistribute(placements=[Shard(-1)]).to_local()

        return distribute_module(module, device_mesh, input_fn=gather, output_fn=cut)


def _positions_of_whole_sequence(part: Decoder, tp: int) -> None:
    """Hidden states that come into a later stage hold 1 / tp of the tokens; attention sees all of them."""
    if not part.is_first:
        positions, whole_length = part.positions, part.whole_length
        part.positions = lambda seq_len, device: positions(seq_len * tp, device)
        part.whole_length = lambda seq_len: whole_length(seq_len * tp)
