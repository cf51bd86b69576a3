"""The device mesh: one set of ranks under several views, checked against the configuration.

    dense      pp x dp_replicate x fsdp x tp        fsdp = dp_shard * cp
    experts    pp x dp_replicate x efsdp x ep       efsdp * ep = fsdp * tp

pp is outermost and tp (or ep) innermost, so that the axes that talk most are on neighbouring ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dmoe.config import SPLIT_BACKWARD_SCHEDULES, ModelConfig, MoEConfig, ParallelConfig, TrainConfig, require


@dataclass(frozen=True)
class ParallelMesh:
    """The views and groups of one layout."""

    config: ParallelConfig
    """With dp_shard filled in."""
    dense: DeviceMesh
    """("pp", "dp_replicate", "fsdp", "tp")"""
    experts: DeviceMesh
    """("pp", "dp_replicate", "efsdp", "ep")"""
    context: DeviceMesh
    """("rest", "cp", "tp"): for the group over which a sequence is split."""
    batch: DeviceMesh
    """("pp", "batch"): for the group that shares one batch in a pipeline stage."""
    sequence: DeviceMesh
    """("rest", "sequence"): for the cp x tp ranks that share sequences."""

    @property
    def dp_size(self) -> int:
        """Parts that a batch is split into."""
        return self.config.dp_replicate * self.config.dp_shard

    @property
    def dp_rank(self) -> int:
        """Which part of a batch this rank has."""
        fsdp_rank = self.dense.get_local_rank("fsdp")
        return self.dense.get_local_rank("dp_replicate") * self.config.dp_shard + fsdp_rank // self.config.cp

    @property
    def batch_group(self) -> dist.ProcessGroup:
        """Ranks with the same layers and tokens of the same batch."""
        return self.batch.get_group("batch")

    @property
    def sequence_group(self) -> dist.ProcessGroup:
        """Ranks with parts of the same sequences, and the same layers."""
        return self.sequence.get_group("sequence")

    def data_axes(self, view: DeviceMesh) -> DeviceMesh | None:
        """The part of `view` that FSDP uses: 2-D with dp_replicate, else 1-D; None if it is one rank."""
        shard = "efsdp" if "efsdp" in (view.mesh_dim_names or ()) else "fsdp"
        if self.config.dp_replicate > 1:
            return view["dp_replicate", shard]
        return view[shard] if view[shard].size() > 1 else None


def resolve(config: ParallelConfig, world_size: int) -> ParallelConfig:
    """Fill in dp_shard and check that the axes fit the world and each other. Raises ConfigError."""
    others = config.pp * config.dp_replicate * config.cp * config.tp
    sizes = f"pp {config.pp} x dp_replicate {config.dp_replicate} x cp {config.cp} x tp {config.tp}"
    if config.dp_shard == -1:
        require(
            world_size % others == 0, "the number of ranks", world_size,
            f"divisible by parallel.{sizes} = {others}",
        )  # fmt: skip
        config = replace(config, dp_shard=world_size // others)
    total = others * config.dp_shard
    require(
        total == world_size, "the number of ranks", world_size,
        f"the product {total} of parallel.{sizes} x dp_shard {config.dp_shard}",
    )  # fmt: skip
    inner = config.dp_shard * config.cp * config.tp
    require(
        inner % config.ep == 0, "parallel.ep", config.ep,
        f"a divisor of dp_shard {config.dp_shard} x cp {config.cp} x tp {config.tp} = {inner}",
    )  # fmt: skip
    return config


def build_mesh(config: ParallelConfig, *, device_type: str = "cpu") -> ParallelMesh:
    """The mesh over all ranks of the default process group. Collective. Raises ConfigError where sizes do not fit."""
    world_size = dist.get_world_size()
    config = resolve(config, world_size)
    pp, replicas, fsdp, tp = config.pp, config.dp_replicate, config.dp_shard * config.cp, config.tp

    def view(**axes: int) -> DeviceMesh:
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    return ParallelMesh(
        config,
        dense=view(pp=pp, dp_replicate=replicas, fsdp=fsdp, tp=tp),
        experts=view(pp=pp, dp_replicate=replicas, efsdp=fsdp * tp // config.ep, ep=config.ep),
        context=view(rest=pp * replicas * config.dp_shard, cp=config.cp, tp=tp),
        batch=view(pp=pp, batch=replicas * fsdp * tp),
        sequence=view(rest=pp * replicas * config.dp_shard, sequence=config.cp * tp),
    )


def check_model(config: ParallelConfig, model: ModelConfig, train: TrainConfig) -> None:
    """Check a resolved layout against the model and the batch. Raises ConfigError naming both fields."""

    def divides(axis: str, size: int, name: str, value: int) -> None:
        require(value % size == 0, name, value, f"divisible by parallel.{axis} ({size})")

    dp = config.dp_replicate * config.dp_shard
    require(
        train.micro_batch_size % dp == 0, "train.micro_batch_size", train.micro_batch_size,
        f"divisible by the data-parallel ranks: dp_replicate {config.dp_replicate} x dp_shard {config.dp_shard}",
    )  # fmt: skip
    if config.cp > 1:
        divides("cp times 2", 2 * config.cp, "train.seq_len", train.seq_len)
    if config.tp > 1:
        require(not train.compile, "train.compile", True, f"False with parallel.tp ({config.tp}): it cannot trace it")
        divides("tp times cp", config.tp * config.cp, "train.seq_len", train.seq_len)
        part = -(-model.vocab_size // config.tp)
        require(
            part * (config.tp - 1) < model.vocab_size, "model.vocab_size", model.vocab_size,
            f"large enough for each of parallel.tp ({config.tp}) ranks to get a row in parts of {part}",
        )  # fmt: skip
        require(
            model.latent.kv_lora_rank == 0, "model.latent.kv_lora_rank", model.latent.kv_lora_rank,
            f"0 with parallel.tp ({config.tp}): latent attention is not split over heads",
        )  # fmt: skip
        divides("tp", config.tp, "model.num_heads", model.num_heads)
        divides("tp", config.tp, "model.num_kv_heads", model.num_kv_heads)
    if model.moe_layers():
        check_moe(config, model.moe)
        divides("ep", config.ep, "model.moe.num_experts", model.moe.num_experts)
        if config.ep == 1:
            divides("tp", config.tp, "model.moe.intermediate_size", model.moe.intermediate_size)
    else:
        require(config.ep == 1, "parallel.ep", config.ep, "1 for a model without experts")
    stages = config.pp * config.num_local_stages if config.pp > 1 else 1
    require(
        stages <= model.num_layers, "model.num_layers", model.num_layers,
        f"at least the {stages} pipeline stages, parallel.pp {config.pp} x {config.num_local_stages} a rank",
    )  # fmt: skip
    if config.pp > 1:
        check_schedule(config, train)


def check_moe(config: ParallelConfig, moe: MoEConfig) -> None:
    """What a routing rule demands of a layout."""
    if config.pp > 1:
        wanted = f'another than "hash" with parallel.pp ({config.pp}): only the first stage has the ids of the tokens'
        require(moe.routing != "hash", "model.moe.routing", moe.routing, wanted)


def check_schedule(config: ParallelConfig, train: TrainConfig) -> None:
    """What a pipeline schedule demands of the number of micro-batches and of activation checkpointing."""
    micro_batches = train.batch_size // train.micro_batch_size
    kind = f'parallel.schedule "{config.schedule}"'
    name = "train.batch_size / train.micro_batch_size"
    if config.schedule == "1f1b":
        require(micro_batches >= config.pp, name, micro_batches, f"at least parallel.pp ({config.pp}) with {kind}")
    if config.schedule in ("interleaved_1f1b", "interleaved_zero_bubble"):
        rounds = max(1, micro_batches // config.pp)
        require(
            micro_batches % rounds == 0, name, micro_batches, f"a multiple of parallel.pp ({config.pp}) with {kind}"
        )
    if config.schedule == "dualpipev":
        least = 2 * config.pp
        require(micro_batches >= least, name, micro_batches, f"at least twice parallel.pp ({least}) with {kind}")
    if config.schedule in SPLIT_BACKWARD_SCHEDULES:
        require(
            recent_torch(), "parallel.schedule", config.schedule,
            f"another with torch {torch.__version__}: splitting the backward of an autograd.Function needs torch 2.13",
        )  # fmt: skip
        require(
            not train.activation_checkpointing, "train.activation_checkpointing", True,
            f"False with {kind}, which splits a backward that recomputation needs whole",
        )  # fmt: skip


def recent_torch() -> bool:
    """Whether torch is 2.13 or newer. 2.11 can split the backward of no autograd.Function; 2.12 was not tried."""
    return tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


def init_process_group(config: ParallelConfig, device_type: str) -> None:
    """Join the process group that torchrun describes in the environment; nccl on GPUs, gloo elsewhere."""
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout_seconds))
