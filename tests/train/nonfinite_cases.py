"""A tiny model, and ways to make a step of it not finite; in one process and in the ranks of a test."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmoe.config import ModelConfig, MoEConfig, ParallelConfig, ProfilingConfig, RunConfig, TrainConfig
from dmoe.parallel import build_mesh
from dmoe.train.engine import Batch, Engine, build_engine
from dmoe.train.nonfinite import NonFiniteExplainer
from dmoe.train.optim import build_optimizer
from dmoe.train.step import StepResult, training_step


class NaNGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * math.nan


def config(
    parallel: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, num_layers: int = 2, **train: Any
) -> RunConfig:
    experts = MoEConfig(num_experts=4, top_k=2, intermediate_size=16, **(moe or {}))
    model = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=num_layers, num_heads=2, num_kv_heads=2, head_dim=16,
        intermediate_size=32, max_seq_len=16, moe=experts,
    )  # fmt: skip
    run = TrainConfig(
        **{"batch_size": 8, "micro_batch_size": 4, "seq_len": 8, "precision": "fp32", "device": "cpu"} | train
    )
    data = replace(RunConfig().data, tokenizer="bytes")
    return RunConfig(model=model, train=run, data=data, parallel=ParallelConfig(**(parallel or {})))


class Run:
    """Steps of an engine, and what was said about those that were not finite."""

    def __init__(self, run: RunConfig, *, spread: bool = False, explain: bool = True) -> None:
        self.config = run
        torch.manual_seed(0)
        mesh = build_mesh(run.parallel) if spread else None
        self.engine: Engine = build_engine(run, torch.device("cpu"), mesh)
        self.optimizer = build_optimizer(self.engine.parts, run.optim)
        self.explainer = NonFiniteExplainer(self.engine, ProfilingConfig(explain_non_finite=explain))
        self.lines: list[str] = []

    def batch(self, step: int = 0) -> Batch:
        tokens = np.random.default_rng(step).integers(0, 64, 500).astype(np.uint16)
        return self.engine.batch(tokens, np.arange(self.config.train.batch_size) * 20)

    def step(self, step: int = 0) -> StepResult:
        self.lines = []
        batch = self.batch(step)
        self.explainer.remember()
        result = training_step(self.engine, self.optimizer, batch, self.config.optim)
        if not result.finite:
            self.explainer.explain(batch, self.lines.append)
        return result

    def module(self, name: str) -> nn.Module | None:
        """The module of that name, if it is on this rank."""
        for part in self.engine.parts:
            if name in dict(part.named_modules()):
                return part.get_submodule(name)
        return None


def poison_output(module: nn.Module, value: float = math.nan, rows: slice = slice(0, 1)) -> Any:
    """Make some rows of a module's output bad; returns the handle that undoes it."""

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        bad = torch.zeros_like(output)
        bad.view(-1, bad.shape[-1])[rows] = value
        return output + bad

    return module.register_forward_hook(spoil)


def poison_gradient(module: nn.Module) -> Any:
    """Make the gradient of a module's input NaN, by its last operation; returns the handle that undoes it."""
    forward = module.forward
    module.forward = lambda x, *args: forward(NaNGradient.apply(x), *args)  # type: ignore[method-assign]
    return lambda: delattr(module, "forward")
