"""Layouts that must give the numbers of one process, and the run they are compared in.

The run is hard on purpose: the vocabulary divides by nothing, sequences are padded unevenly and some to nothing,
experts 6 and 7 get no token at first (with ep 4 a rank receives none), the first layer is dense, there are shared
experts, every balancing loss at once, a bias of the choice, and two micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dmoe.checkpoint.stored_form import stored_form
from dmoe.config import (
    SPLIT_BACKWARD_SCHEDULES,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from dmoe.moe import moe_layers
from dmoe.moe.sharded import copy_shard
from dmoe.parallel import build_mesh
from dmoe.parallel.mesh import recent_torch
from dmoe.train.engine import Engine, build_engine
from dmoe.train.optim import build_optimizer
from dmoe.train.step import training_step

STEPS = 3
LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "z_loss")


@dataclass(frozen=True)
class Case:
    """A layout, and what differs from `BASE`."""

    parallel: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def config(self, precision: str) -> RunConfig:
        base = BASE
        model = replace(base.model, **self.model, moe=replace(base.model.moe, **self.moe))
        train = replace(base.train, **self.train, precision=precision)  # type: ignore[arg-type]
        return replace(base, model=model, train=train, parallel=ParallelConfig(**self.parallel))

    @property
    def alone(self) -> Case:
        """The same in one process, eager and without recomputation: the numbers that this one must have."""
        return replace(self, parallel={}, train={k: v for k, v in self.train.items() if k not in HOW})

    @property
    def reference(self) -> str:
        """Names that run."""
        return repr(self.alone)


BASE = RunConfig(
    model=ModelConfig(
        vocab_size=67, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24,
        first_k_dense=1, max_seq_len=64,
        moe=MoEConfig(intermediate_size=12, num_experts=8, top_k=2, shared_intermediate_size=8, aux_loss_coef=0.1,
                      seq_aux_loss_coef=0.07, global_aux_loss_coef=0.05, z_loss_coef=0.01, expert_bias_rate=0.003),
    ),
    optim=OptimConfig(lr=2e-3, eps=1e-6, clip_norm=1.0),
    train=TrainConfig(steps=STEPS, batch_size=8, micro_batch_size=4, seq_len=16, device="cpu", seed=3, sample_tokens=0),
    data=replace(RunConfig().data, vocab_size=300, tokenizer="bytes"),
)  # fmt: skip
HOW = ("compile", "activation_checkpointing")  # must not change a number
FOUR = {"batch_size": 8, "micro_batch_size": 2}
UNTIED = {"tie_embeddings": False}
FIVE = {"num_layers": 5}  # for schedules with two stages a rank

CASES: dict[int, dict[str, Case]] = {
    2: {
        "dp 2": Case({"dp_replicate": 2}),
        "fsdp 2": Case({"dp_shard": 2}),
        "ep 2": Case({"ep": 2}),
        "ep 2, no FSDP on experts, chunks": Case({"ep": 2, "max_rows": 37}),
        "ep 2, tokens": Case({"ep": 2, "ep_sends": "tokens"}),
        "ep 2, checkpointing": Case({"ep": 2}, train={"activation_checkpointing": True}),
        "ep 2, compiled": Case(
            {"ep": 2}, moe={"global_aux_loss_coef": 0.0}, train={"compile": True, "activation_checkpointing": True}
        ),
        "ep 2, tokens, compiled": Case(
            {"ep": 2, "ep_sends": "tokens"}, moe={"global_aux_loss_coef": 0.0}, train={"compile": True}
        ),
        "ep 2, chunks, compiled": Case({"ep": 2, "max_rows": 37}, train={"compile": True}),
        "fsdp 2, compiled": Case({"dp_shard": 2}, train={"compile": True}),
        "cp 2, compiled": Case({"cp": 2}, train={"compile": True}),
        "tp 2": Case({"tp": 2, "sequence_parallel": False}, model=UNTIED),
        "tp 2 sp": Case({"tp": 2}),
        "tp 2 sp, whole logits": Case({"tp": 2, "loss_parallel": False}, model={"qk_norm": "full"}),
        "tp 2 ep 2": Case({"tp": 2, "ep": 2}),
        "tp 2 ep 2, no sp": Case({"tp": 2, "ep": 2, "sequence_parallel": False}, model=UNTIED),
        "tp 2, plain experts, biases": Case({"tp": 2}, moe={"gated": False, "bias": True, "activation": "gelu"}),
        "tp 2, biases": Case({"tp": 2}, moe={"bias": True}),
        "tp 2, latent experts, gate": Case(
            {"tp": 2}, moe={"latent_size": 8, "shared_expert_gate": True, "router_bias": True}
        ),
        "ep 2, padded to capacity": Case({"ep": 2}, moe={"capacity_factor": 4.0, "pad_to_capacity": True}),
        "dp 2, sinkhorn": Case({"dp_replicate": 2}, moe={"routing": "sinkhorn", "expert_bias_rate": 0.0}),
        "cp 2": Case({"cp": 2}),
        "cp 2 ep 2": Case({"cp": 2, "ep": 2}),
        "pp 2 1f1b": Case({"pp": 2}),
        "pp 2 gpipe": Case({"pp": 2, "schedule": "gpipe"}, model=UNTIED),
        "pp 2 interleaved": Case({"pp": 2, "schedule": "interleaved_1f1b"}, model=FIVE),
        "pp 2 looped bfs": Case({"pp": 2, "schedule": "looped_bfs"}, model=FIVE),
        "pp 2 zero bubble": Case({"pp": 2, "schedule": "interleaved_zero_bubble"}, model=FIVE),
        "pp 2 zbv": Case({"pp": 2, "schedule": "zbv"}, model=FIVE, train=FOUR),
        "pp 2 dualpipev": Case({"pp": 2, "schedule": "dualpipev"}, model=FIVE, train=FOUR),
        "pp 2, checkpointing": Case({"pp": 2}, train={"activation_checkpointing": True}),
    },
    4: {
        "hsdp 2x2": Case({"dp_replicate": 2, "dp_shard": 2}),
        "ep 4": Case({"ep": 4}),
        "fsdp 2 x ep 2": Case({"dp_shard": 4, "ep": 2}),
        "fsdp 2 x tp 2 x ep 4, tokens": Case({"dp_shard": 2, "tp": 2, "ep": 4, "ep_sends": "tokens"}),
        "fsdp 2 x ep 2, an expert a rank": Case({"dp_shard": 4, "ep": 2}, moe={"num_experts": 2, "latent_size": 6}),
        "fsdp 2 x tp 2, one expert": Case({"dp_shard": 2, "tp": 2}, moe={"num_experts": 1, "top_k": 1, "bias": True}),
        "fsdp 2 x ep 2, compiled": Case({"dp_shard": 4, "ep": 2}, train={"compile": True}),
        "dp 2 x ep 2": Case({"dp_replicate": 2, "dp_shard": 2, "ep": 2}),
        "fsdp 2 x tp 2": Case({"dp_shard": 2, "tp": 2}),
        "fsdp 2 x tp 2 x ep 4": Case({"dp_shard": 2, "tp": 2, "ep": 4}, model=UNTIED),
        "fsdp 2 x tp 2 x ep 2": Case({"dp_shard": 2, "tp": 2, "ep": 2, "reshard_after_forward": False}),
        "fsdp 2 x cp 2 x ep 2": Case({"dp_shard": 2, "cp": 2, "ep": 2}),
        "tp 2 x cp 2": Case({"tp": 2, "cp": 2}),
        "pp 2 x fsdp 2": Case({"pp": 2, "dp_shard": 2, "schedule": "interleaved_1f1b"}, model=FIVE),
        "pp 2 x fsdp 2, zero bubble": Case(
            {"pp": 2, "dp_shard": 2, "schedule": "interleaved_zero_bubble"}, model=FIVE
        ),
        "pp 2 x tp 2": Case({"pp": 2, "tp": 2}),
        "pp 2 x ep 2, zero bubble": Case({"pp": 2, "ep": 2, "schedule": "interleaved_zero_bubble"}, model=FIVE),
    },
    8: {
        "pp 2 x fsdp 2 x ep 2": Case({"pp": 2, "dp_shard": 4, "ep": 2}),
        "dp_replicate 2 x dp_shard 2 x tp 2": Case({"dp_replicate": 2, "dp_shard": 2, "tp": 2}),
    },
}  # fmt: skip


def supported(case: Case) -> bool:
    """Whether this torch can run a case."""
    return recent_torch() or case.parallel.get("schedule") not in SPLIT_BACKWARD_SCHEDULES


def run_case(config: RunConfig, *, spread: bool) -> dict[str, Any]:
    """Train; losses and gradient norm of each step, and every parameter and bias of the choice afterwards."""
    device = torch.device("cpu")
    mesh = build_mesh(config.parallel) if spread else None
    engine = build_engine(config, device, mesh)
    starve_experts(engine)
    optimizer = build_optimizer(engine.parts, config.optim)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 1000).astype(np.uint16)
    draw = np.random.default_rng(1)
    metrics = []
    for _ in range(config.train.steps):
        size = config.train.batch_size
        starts = draw.integers(0, 900, size)
        lengths = np.where(draw.random(size) < 0.3, 0, draw.integers(0, config.train.seq_len + 1, size))
        result = training_step(engine, optimizer, engine.batch(tokens, starts, lengths), config.optim)
        summaries = engine.load_summaries()
        engine.reset_statistics()
        counts = [n for s in summaries.values() for n in s.tokens_per_expert]
        losses = {name: [getattr(s, name) for s in summaries.values()] for name in LOSSES}
        metrics.append({"loss": result.loss, "grad_norm": result.grad_norm, "counts": counts, **losses})
    unseen = engine.batch(tokens, np.arange(config.train.micro_batch_size))
    evaluation = engine.evaluate(unseen).item()
    scale_weights(optimizer, 0.5)  # weights that were gathered for the first evaluation must not serve the second
    evaluation += engine.evaluate(unseen).item()
    scale_weights(optimizer, 2.0)
    return {"metrics": metrics, "weights": whole_weights(engine), "evaluation": evaluation}


def scale_weights(optimizer: torch.optim.Optimizer, factor: float) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.mul_(factor)


def starve_experts(engine: Engine) -> None:
    """Router rows in opposite pairs, and two rows of zeros: some logits are positive, so those two are never chosen."""
    for part in engine.parts:
        for name, layer in moe_layers(part).items():
            half = torch.randn(3, layer.config.hidden_size, generator=torch.Generator().manual_seed(len(name)))
            rows = torch.cat([half, -half, torch.zeros(2, half.shape[1])])[: layer.config.num_experts]
            rows = rows.to(layer.router.weight.dtype)
            with torch.no_grad():
                weight = layer.router.weight
                if hasattr(weight, "to_local"):
                    copy_shard(weight, rows)
                else:
                    weight.copy_(rows)


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter of this rank's parts, assembled, and the biases of the choice."""
    result = {}
    for part in engine.parts:
        for module in part.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        for name, parameter in part.named_parameters():
            result[name] = whole(name, parameter.detach())
        result |= {name: buffer.clone() for name, buffer in part.named_buffers() if name.endswith("correction_bias")}
    return result


def whole(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a parameter or moment, assembled. Through the form in which it is stored: torch 2.11 cannot assemble
    gate and up parts side by side."""
    if not hasattr(tensor, "full_tensor"):
        return tensor.clone()
    return stored_form(name, tensor).full_tensor().reshape(tensor.shape)  # type: ignore[attr-defined]
