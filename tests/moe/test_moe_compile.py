"""`MoE` under torch.compile: one graph in every mode, the numbers of eager."""

import os
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmoe.moe import LoadSummary, MoE, MoEConfig, Recorder, set_aux_loss_scale

HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++")))


def build() -> MoE:
    layer = MoE(
        MoEConfig(
            hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, shared_intermediate_size=8, aux_loss_coef=0.1,
            z_loss_coef=0.1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def step(layer: MoE, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    layer.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    y.square().mean().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]


def check(layer: MoE, compiled: Callable[[Tensor], Tensor], recorder: Recorder | None, tolerance: float) -> None:
    for tokens in (6, 9):  # the second size recompiles with dynamic shapes
        x = torch.randn(tokens, 16)
        results, summaries = [], []
        for call in (layer, compiled):
            results.append(step(layer, call, x))
            if recorder is not None:
                recorder.update()
                summaries.append(recorder.summary()[""])
                recorder.reset()
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        if summaries:
            assert_same_summary(*summaries)


def assert_same_summary(want: LoadSummary, got: LoadSummary) -> None:
    assert got.tokens_per_expert == want.tokens_per_expert
    assert [got.aux_loss, got.z_loss, got.router_entropy] == pytest.approx(
        [want.aux_loss, want.z_loss, want.router_entropy], rel=1e-5
    )


@pytest.mark.parametrize("recording", [False, True], ids=["", "recorder"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpoint inside"])
def test_one_graph(checkpointed: bool, recording: bool) -> None:
    layer = build()
    recorder = Recorder(layer) if recording else None

    def call(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)

    torch.compiler.reset()
    check(layer, torch.compile(call, fullgraph=True, backend="aot_eager"), recorder, 1e-6)


def test_checkpoint_outside_the_compiled_layer() -> None:
    layer = build()
    recorder = Recorder(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    check(layer, lambda x: checkpoint(compiled, x, use_reentrant=False), recorder, 1e-6)


def test_eval_autocast_and_a_changed_loss_scale() -> None:
    layer, x = build(), torch.randn(6, 16)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 0.25):
        set_aux_loss_scale(layer, scale)
        for want, got in zip(step(layer, layer, x), step(layer, compiled, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for want, got in zip(step(layer, layer, x), step(layer, compiled, x), strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    layer = build()
    torch.compiler.reset()
    x = torch.randn(6, 16)
    compiled = torch.compile(layer, fullgraph=True)
    for want, got in zip(step(layer, layer, x), step(layer, compiled, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
