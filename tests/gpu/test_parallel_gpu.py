"""The pieces of the parallel layouts on a GPU, in a process group of one rank: NCCL, streams, half precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dmoe.config import ModelConfig, MoEConfig, OptimConfig, ParallelConfig, TrainConfig
from dmoe.models import Decoder
from dmoe.models.attention import causal_attention
from dmoe.moe import BatchGroups, MoE
from dmoe.moe.dispatch import AllToAllDispatcher, TensorParallelDispatcher
from dmoe.moe.dispatch_tokens import TokenDispatcher
from dmoe.parallel import build_mesh
from dmoe.parallel.context import ContextAttention
from dmoe.parallel.fsdp import apply_fsdp
from dmoe.parallel.loss import _SplitCrossEntropy
from dmoe.train.engine import Engine
from dmoe.train.optim import build_optimizer
from dmoe.train.step import training_step

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=CUDA)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def outputs_and_gradients(layer: MoE, x: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.float().square().mean().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 1000])
def test_exchange_over_nccl_changes_no_bit(group: dist.ProcessGroup, tokens: int, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    config = MoEConfig(hidden_size=256, intermediate_size=128, num_experts=8, top_k=3, shared_intermediate_size=64)
    layer = MoE(config, device=CUDA, dtype=dtype)
    x = torch.randn(tokens, 256, device=CUDA, dtype=dtype)
    expected = outputs_and_gradients(layer, x, autocast)
    layer.groups = BatchGroups(batch=group)
    for dispatcher in (AllToAllDispatcher(group, 8), TokenDispatcher(group, 8), TensorParallelDispatcher(group)):
        layer.dispatcher = dispatcher
        for ours, theirs in zip(outputs_and_gradients(layer, x, autocast), expected, strict=True):
            # Under autocast the tokens are cast once, not by each user, so gradients of x add up in bf16.
            error = (ours - theirs).float().norm() / theirs.float().norm().clamp_min(1e-20)
            assert error == 0 if not autocast or ours.numel() == 0 else error < 0.01


@pytest.mark.parametrize(("payload", "error"), [("bf16", 0.02), ("fp8", 0.12)])
def test_rounded_payloads(group: dist.ProcessGroup, payload: str, error: float) -> None:
    layer = MoE(MoEConfig(hidden_size=256, intermediate_size=128, num_experts=8, top_k=3), device=CUDA)
    x = torch.randn(500, 256, device=CUDA)
    expected = outputs_and_gradients(layer, x, False)
    layer.dispatcher = AllToAllDispatcher(group, 8, payload=payload)
    for ours, theirs in zip(outputs_and_gradients(layer, x, False), expected, strict=True):
        assert 0 < (ours - theirs).norm() / theirs.norm() < error


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_context_attention(group: dist.ProcessGroup, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    q = torch.randn(2, 512, heads, 64, device=CUDA, dtype=dtype)
    k, v = torch.randn(2, 2, 512, kv_heads, 64, device=CUDA, dtype=dtype)
    wide = [t.double().cpu() for t in (q, k, v)]
    expected = causal_attention(*wide)
    tolerance = {"rtol": 0, "atol": 2e-5 if dtype == torch.float32 else 3e-2}
    torch.testing.assert_close(ContextAttention(group)(q, k, v).double().cpu(), expected, **tolerance)
    last = causal_attention(q[:, 300:], k, v)
    torch.testing.assert_close(last.double().cpu(), expected[:, 300:], **tolerance)


def test_split_cross_entropy(group: dist.ProcessGroup) -> None:
    logits = torch.randn(300, 1001, device=CUDA, requires_grad=True)
    targets = torch.randint(-1, 1001, (300,), device=CUDA)
    wide = logits.detach().double().cpu().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, targets.cpu(), ignore_index=-1, reduction="sum")
    loss = _SplitCrossEntropy.apply(logits, targets, 0, group)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.double().cpu(), wide.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fsdp_unit_of_one_rank(precision: str) -> None:
    """FSDP's hooks, dtypes and streams around the layers and the experts, against the plain model."""
    model = ModelConfig(vocab_size=260, hidden_size=128, num_layers=2, moe=MoEConfig(intermediate_size=96, top_k=2))
    train = TrainConfig(steps=3, batch_size=8, micro_batch_size=4, seq_len=64, precision=precision, device="cuda")
    mesh = build_mesh(ParallelConfig(), device_type="cuda")

    class OneRank:
        """A mesh whose data axes are used although they are one rank."""

        config, dense, experts = mesh.config, mesh.dense, mesh.experts

        def data_axes(self, view):  # type: ignore[no-untyped-def]
            return view["fsdp"]

    runs = []
    for fsdp in (False, True):
        part = Decoder.on_meta(replace(model))
        if fsdp:
            apply_fsdp(part, OneRank(), torch.bfloat16 if precision == "bf16" else None)  # type: ignore[arg-type]
        part.to_empty(device=CUDA)
        part.init_weights(0)
        engine = Engine([part], train, CUDA, mesh)
        optimizer = build_optimizer([part], OptimConfig())
        tokens = np.random.default_rng(0).integers(0, 256, 2000).astype(np.uint16)
        runs.append(
            [
                training_step(engine, optimizer, engine.batch(tokens, np.arange(8) * 100 + step), OptimConfig())
                for step in range(3)
            ]
        )
    for plain, sharded in zip(*runs, strict=True):
        assert sharded.loss == pytest.approx(plain.loss, rel=1e-5)
        assert sharded.grad_norm == pytest.approx(plain.grad_norm, rel=1e-3 if precision == "fp32" else 0.02)
