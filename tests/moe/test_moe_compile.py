"""`MoE` under torch.compile: one graph in every mode, the numbers of eager."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dmoe.moe import LoadBalancer, LoadSummary, MoE, MoEConfig, Recorder, set_aux_loss_scale
from dmoe.moe.dispatch import dispatch_local

HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++")))


def build(**changes: object) -> MoE:
    config = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "top_k": 2, "shared_intermediate_size": 8}
    layer = MoE(MoEConfig(**{**config, "aux_loss_coef": 0.1, "z_loss_coef": 0.1, **changes}))
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


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity_factor": 0.6, "seq_aux_loss_coef": 0.1, "score_function": "sqrtsoftplus", "n_group": 2},
        {"capacity_factor": 0.6, "pad_to_capacity": True, "latent_size": 8, "shared_expert_gate": True},
        {"routing": "expert_choice"},
        {"routing": "uniform", "router_bias": True, "router_dtype": "fp64"},
        {"routing": "random", "weigh_input": True},
        {
            "routing": "sparsemixer",
            "norm_topk_prob": False,
            "sparsemixer_eps": 0.0,
        },  # one is near: draws decide nothing
    ],
    ids=["dropping", "slots", "expert choice", "uniform", "random", "sparsemixer"],
)
def test_one_graph_with_options(changes: dict[str, object]) -> None:
    """With a mask, too."""
    layer = build(**changes)
    recorder = Recorder(layer)

    def call(x: Tensor, compute: Callable[..., Tensor]) -> Tensor:
        return compute(x, token_mask=torch.arange(len(x)) != 1)

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (9, 12, 17):  # the second size recompiles with dynamic shapes
        results, counts = [], []
        for compute in (layer, compiled):
            torch.manual_seed(0)  # for "random"
            x = torch.linspace(-2, 3, 16 * tokens).view(tokens, 16)
            results.append(step(layer, lambda x, compute=compute: call(x, compute), x))
            recorder.update()
            counts.append(recorder.summary()[""].tokens_per_expert)
            recorder.reset()
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert counts[0] == counts[1]


def test_counts_of_a_step_in_a_compiled_layer() -> None:
    """The bias moves by what was routed once, though activation checkpointing runs the compiled layer twice."""
    layer = build(expert_bias_rate=0.01, score_function="sigmoid")
    torch.compiler.reset()
    layer.compile(fullgraph=True, backend="aot_eager")
    model = torch.nn.Sequential(layer)
    model.forward = lambda x: checkpoint(layer, x, use_reentrant=False)  # type: ignore[method-assign]
    balancer, x = LoadBalancer(model), torch.randn(30, 16)
    for _ in range(2):
        model(x).sum().backward()
    assert layer.step_load is not None
    counts = layer.step_load.step_E.clone()
    assert counts.sum() == 2 * 30 * 2
    direction = torch.sign(counts.float().mean() - counts)
    balancer.step()
    torch.testing.assert_close(layer.router.e_score_correction_bias, 0.01 * (direction - direction.mean()))


def test_checkpoint_outside_the_compiled_layer() -> None:
    layer = build()
    recorder = Recorder(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    check(layer, lambda x: checkpoint(compiled, x, use_reentrant=False), recorder, 1e-6)


@pytest.mark.parametrize(
    ("changes", "checkpointed"),
    [({"seq_aux_loss_coef": 0.1}, True), ({"latent_size": 8, "routing": "expert_choice"}, False)],
)
def test_experts_outside_the_graphs(changes: dict[str, object], checkpointed: bool) -> None:
    """The auxiliary losses of the graph before them reach the router through the graph after them."""
    layer = build(**changes)
    compiled = build(**changes)
    compiled.load_state_dict(layer.state_dict())
    inside = []

    def dispatch(*arguments: Any) -> Tensor:
        inside.append(torch.compiler.is_compiling())
        return dispatch_local(*arguments)

    compiled.dispatcher = dispatch
    compiled.leave_experts_uncompiled()
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=backend)
    for tokens in (6, 9):
        x = torch.randn(tokens, 16)
        call = (lambda x: checkpoint(compiled, x, use_reentrant=False)) if checkpointed else compiled
        for want, got in zip(step(layer, layer, x), step(compiled, call, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert backend.frame_count >= 2
    assert not any(inside)


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


@pytest.mark.parametrize(
    "options",
    [{"capacity_factor": 0.7, "pad_to_capacity": True}, {"routing": "expert_choice"}, {"weigh_input": True}, {}],
)
def test_export(options: dict[str, object]) -> None:
    """Nothing is read on the host, which a graph could not hold: for the exported number of tokens."""
    layer, x = build(**options).eval(), torch.randn(2, 9, 16)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    exported = torch.export.export(layer, (x,), {"token_mask": mask}, strict=False).module()
    for tokens in (x, torch.randn(2, 9, 16)):
        torch.testing.assert_close(exported(tokens, token_mask=mask), layer(tokens, token_mask=mask))
