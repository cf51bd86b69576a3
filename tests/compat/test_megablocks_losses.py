"""The losses that the layers of the MegaBlocks interface save, and its `Arguments`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import warnings
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megablocks_oracle import arguments
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe.compat.megablocks import layers
from dmoe.compat.megablocks.layers import dmoe, moe, router
from dmoe.compat.megablocks.layers.arguments import Arguments, from_megatron
from dmoe.errors import ConfigError

CLASSES = {"dMoE": dmoe.dMoE, "MoE": moe.MoE}


@pytest.fixture(autouse=True)
def _no_saved_losses():
    yield
    moe.clear_load_balancing_loss()
    router.clear_router_zloss()


def stack(cls: Any, num_layers: int, **kwargs: Any) -> tuple[nn.ModuleList, Arguments]:
    args = arguments(
        num_layers=num_layers, moe_num_experts=5, moe_top_k=2, return_bias=False, init_method=nn.init.normal_, **kwargs
    )  # fmt: skip
    return nn.ModuleList([cls(args) for _ in range(num_layers)]), args


def run(model: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in model:
        x = x + layer(x)
    return x


def statistics(model: nn.ModuleList, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(counts, scores, logits) of each layer in fp64, by hand."""
    found = []
    for layer in model:
        logits = (x @ layer.router.layer.weight.t()).double().view(-1, 5)
        scores = logits.softmax(-1)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)
        found.append((chosen.sum(0), scores, logits))
        x = x + layer(x)
    return found


@pytest.mark.parametrize("cls", CLASSES)
def test_balancing_loss_and_zloss_against_their_formulas(cls: str) -> None:
    model, args = stack(CLASSES[cls], 3, moe_loss_weight=0.3, moe_zloss_weight=0.01)
    x = torch.randn(4, 5, 12)
    found = statistics(model.eval(), x)
    assert moe.get_load_balancing_loss() == []  # nothing from layers in eval mode
    assert router._ROUTER_LOGITS == []
    run(model.train(), x)
    lbl, zloss = moe.batched_load_balancing_loss(args), router.batched_router_zloss(args)
    want = sum(5 * 0.3 / (3 * 20 * 2) * (counts * scores.mean(0)).sum() for counts, scores, _ in found)
    torch.testing.assert_close(lbl.double(), want)
    want_z = torch.stack([0.01 * logits.logsumexp(-1).square().mean() for _, _, logits in found])
    assert zloss.shape == (3,)
    torch.testing.assert_close(zloss.double(), want_z)
    saved = moe.get_load_balancing_loss()
    assert [counts.tolist() for counts, _ in saved] == [c.tolist() for c, _, _ in found]
    grads = torch.autograd.grad(lbl + zloss.sum(), [layer.router.layer.weight for layer in model], allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    moe.clear_load_balancing_loss()
    assert saved == []  # the list itself was returned
    router.clear_router_zloss()
    with pytest.raises(ConfigError, match="number of saved router logits is 0"):
        router.batched_router_zloss(args)


def test_zloss_of_the_fork() -> None:
    """Beside the balancing loss, divided by top_k, and finite for large logits."""
    model, args = stack(dmoe.dMoE, 2, moe_loss_weight=0.3, moe_zloss_weight=0.01, moe_weight_parallelism=False)
    for scale in (1.0, 1e4):
        x = scale * torch.randn(4, 5, 12)
        found = statistics(model.eval(), x)
        moe.clear_load_balancing_loss()
        run(model.train(), x)
        assert router._ROUTER_LOGITS == []
        assert [len(entry) for entry in moe.get_load_balancing_loss()] == [3, 3]
        lbl, zloss = moe.batched_load_balancing_loss(args)
        want = sum(0.01 * logits.logsumexp(-1).square().sum() for _, _, logits in found) / (2 * 20 * 2)
        assert zloss.dim() == 0
        torch.testing.assert_close(zloss.double(), want, rtol=1e-5, atol=0)
        want = sum(5 * 0.3 / (2 * 20 * 2) * (counts * scores.mean(0)).sum() for counts, scores, _ in found)
        torch.testing.assert_close(lbl.double(), want, rtol=1e-5, atol=0)
    assert len(model[0].router(x)) == 4
    args.moe_loss_weight = 0.0
    assert moe.batched_load_balancing_loss(args)[0] == 0.0
    args.moe_zloss_weight = 0.0
    assert moe.batched_load_balancing_loss(args) == 0.0


def test_how_many_layers_must_have_saved() -> None:
    model, args = stack(dmoe.dMoE, 4)
    x = torch.randn(3, 12)
    for pipeline, virtual, expected in ((1, None, 4), (2, None, 2), (2, 1, 1)):
        args.pipeline_model_parallel_size, args.num_layers_per_virtual_pipeline_stage = pipeline, virtual
        for ran in (0, expected - 1, expected + 1):
            moe.clear_load_balancing_loss()
            for i in range(ran):
                model[i % 4](x)
            with pytest.raises(ValueError, match=f"losses is {ran}: must be {expected}, one of each layer"):
                moe.batched_load_balancing_loss(args)
        moe.clear_load_balancing_loss()
        run(model[:expected], x)
        moe.batched_load_balancing_loss(args)
    model[0](torch.randn(2, 12))
    args.num_layers_per_virtual_pipeline_stage = 2
    with pytest.raises(ConfigError, match="shape of scores"):
        moe.batched_load_balancing_loss(args)


def test_without_weight_nothing_is_saved() -> None:
    model, args = stack(moe.MoE, 1, moe_loss_weight=0)
    run(model, torch.randn(3, 12))
    assert moe.get_load_balancing_loss() == []
    assert router._ROUTER_LOGITS == []
    assert moe.batched_load_balancing_loss(args) == 0.0
    with pytest.warns(UserWarning, match="moe_zloss_weight is 0"):
        assert router.batched_router_zloss(args) == 0


def test_no_token_and_fp32() -> None:
    model, args = stack(dmoe.dMoE, 1, moe_zloss_weight=0.1)
    run(model, torch.zeros(0, 12))
    assert moe.batched_load_balancing_loss(args).item() == 0
    assert router.batched_router_zloss(args).tolist() == [0]
    moe.clear_load_balancing_loss()
    router.clear_router_zloss()
    model = model.bfloat16()
    run(model, torch.randn(9, 12).bfloat16())
    for wide, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        args.moe_lbl_in_fp32 = args.moe_zloss_in_fp32 = wide
        assert moe.batched_load_balancing_loss(args).dtype == router.batched_router_zloss(args).dtype == dtype
    ((counts, scores),) = moe.get_load_balancing_loss()
    want = 5 * args.moe_loss_weight / 18 * (counts.double() * scores.double().mean(0)).sum()
    torch.testing.assert_close(moe.batched_load_balancing_loss(args).double(), want)


@pytest.mark.parametrize("paired", [False, True])
def test_activation_checkpointing_saves_once(paired: bool) -> None:
    torch.manual_seed(0)
    model, args = stack(dmoe.dMoE, 2, moe_zloss_weight=0.1, moe_weight_parallelism=False if paired else None)
    x = torch.randn(7, 12, requires_grad=True)

    def losses() -> Tensor:
        lbl = moe.batched_load_balancing_loss(args)
        return sum(lbl) if paired else lbl + router.batched_router_zloss(args).sum()

    def grads(reentrant: bool | None) -> list[Tensor]:
        moe.clear_load_balancing_loss()
        router.clear_router_zloss()
        model.zero_grad()
        out = x
        for layer in model:
            out = out + (layer(out) if reentrant is None else checkpoint(layer, out, use_reentrant=reentrant))
        (losses() + out.sum()).backward()
        assert len(moe.get_load_balancing_loss()) == 2
        assert len(router._ROUTER_LOGITS) == (0 if paired else 2)
        return [p.grad.clone() for p in model.parameters()]

    plain = grads(None)
    for ours, theirs in zip(grads(False), plain):
        assert torch.equal(ours, theirs)
    with pytest.warns(UserWarning, match="trains nothing: .* reentrant"):
        grads(True)


def test_defaults_are_those_of_megablocks() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(Arguments)}
    assert {name: fields[name] for name in (
        "hidden_size", "ffn_hidden_size", "num_layers", "bias", "return_bias", "moe_num_experts", "moe_top_k",
        "moe_capacity_factor", "moe_normalize_expert_weights", "moe_loss_weight", "moe_jitter_eps", "moe_lbl_in_fp32",
        "moe_expert_model_parallelism", "expert_parallel_group", "pipeline_model_parallel_size",
        "num_layers_per_virtual_pipeline_stage", "memory_optimized_mlp", "mlp_type", "mlp_impl", "fp16", "bf16",
        "uniform_expert_assignment", "shared_expert", "fc_cls", "remat_act_fn", "shared_expert_hidden_size",
        "shared_expert_weighted_sum", "moe_zloss_weight", "moe_zloss_in_fp32",
    )} == {
        "hidden_size": 1024, "ffn_hidden_size": 4096, "num_layers": 1, "bias": True, "return_bias": True,
        "moe_num_experts": 1, "moe_top_k": 1, "moe_capacity_factor": 1, "moe_normalize_expert_weights": None,
        "moe_loss_weight": 0.1, "moe_jitter_eps": None, "moe_lbl_in_fp32": False, "moe_expert_model_parallelism": False,
        "expert_parallel_group": None, "pipeline_model_parallel_size": 1, "num_layers_per_virtual_pipeline_stage": None,
        "memory_optimized_mlp": False, "mlp_type": "mlp", "mlp_impl": "grouped", "fp16": True, "bf16": False,
        "uniform_expert_assignment": False, "shared_expert": False, "fc_cls": nn.Linear, "remat_act_fn": True,
        "shared_expert_hidden_size": None, "shared_expert_weighted_sum": False, "moe_zloss_weight": 0,
        "moe_zloss_in_fp32": False,
    }  # fmt: skip
    args = Arguments()
    assert args.shared_expert_hidden_size == 4096
    assert args.fc_kwargs == {}
    assert args.fc_kwargs is not Arguments().fc_kwargs
    assert args.device == (torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu"))
    assert isinstance(args.activation_fn, partial)
    assert args.activation_fn.keywords == {"approximate": "tanh"}
    assert args.activation_fn is layers.arguments.DEFAULT_ACTIVATION_FN
    for method in (args.init_method, args.output_layer_init_method):
        assert method.func is nn.init.normal_
        assert method.keywords == {"mean": 0.0, "std": 0.02}
    known = set(inspect.signature(Arguments).parameters)
    assert known >= {
        "moe_expert_choice", "moe_expert_choice_grouped", "moe_weight_parallelism", "weight_parallel_group",
        "quantize_inputs_num_bits", "quantize_rematerialize_num_bits", "quantize_scatter_num_bits", "grouped_mlp",
    }  # fmt: skip


def test_dtypes() -> None:
    for fp16, bf16, dtype in ((True, False, "float16"), (False, True, "bfloat16"), (False, False, "float32")):
        layer = dmoe.dMoE(arguments(fp16=fp16, bf16=bf16, shared_expert=True))
        for name, p in layer.named_parameters():
            assert p.dtype == (torch.float32 if "shared" in name else getattr(torch, dtype)), name
    with pytest.warns(UserWarning, match="fp16 wins"):
        args = Arguments(bf16=True, hidden_size=4, ffn_hidden_size=4)
    assert dmoe.dMoE(args).router.layer.weight.dtype == torch.float16
    args = arguments(shared_expert=True, bf16=True, fc_kwargs={"dtype": torch.bfloat16, "bias": False})
    shared = dmoe.dMoE(args).shared_expert
    assert shared.up_proj.weight.dtype == torch.bfloat16
    assert shared.up_proj.bias is None


def test_what_is_refused() -> None:
    for kwargs, message in (
        ({"mlp_type": "moe"}, "mlp_type is 'moe'"),
        ({"mlp_impl": "dense"}, "mlp_impl is 'dense'"),
        ({"moe_top_k": 2}, "moe_top_k is 2: must be from 1 to moe_num_experts, 1"),
        ({"moe_weight_parallelism": True}, "fully_shard"),
        ({"quantize_scatter_num_bits": 8}, "quantize_scatter_num_bits is 8: must be -1"),
        ({"moe_expert_choice": True, "moe_expert_choice_grouped": True}, "moe_expert_choice_grouped is True"),
        ({"moe_expert_choice": True, "moe_expert_model_parallelism": True}, "moe_expert_model_parallelism is True"),
    ):
        with pytest.raises(ConfigError, match=message):
            arguments(**kwargs)
        for cls in CLASSES.values():  # and when it was set afterwards
            args = arguments()
            for name, value in kwargs.items():
                setattr(args, name, value)
            with pytest.raises(ConfigError, match=message):
                cls(args)
    with pytest.warns(UserWarning, match="MoE, the layer with a capacity, has plain experts"):
        layer = moe.MoE(arguments(mlp_type="glu"))
    assert "v1" not in dict(layer.experts.mlp.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dmoe.dMoE(arguments(mlp_type="glu", mlp_impl="sparse"))


def test_from_megatron() -> None:
    namespace = argparse.Namespace(
        hidden_size=16, ffn_hidden_size=8, num_layers=3, moe_num_experts=4, moe_top_k=2, moe_capacity_factor=0,
        fp16=False, bf16=True, mlp_type="glu", micro_batch_size=4, num_attention_heads=2, shared_expert=True,
    )  # fmt: skip
    args = from_megatron(namespace)
    assert (args.num_layers, args.moe_num_experts, args.bf16, args.moe_loss_weight) == (3, 4, True, 0.1)
    assert args.shared_expert_hidden_size == 8
    assert not hasattr(args, "micro_batch_size")
    layer = dmoe.dMoE(args)
    assert layer.experts.mlp.v1.shape == (32, 16)


def test_classes() -> None:
    mlp, glu = layers.mlp, layers.glu
    for sub, base in (
        (dmoe.dMoE, moe.MoE), (dmoe.ParallelDroplessMLP, moe.ParallelMLP), (mlp.GroupedMLP, mlp.SparseMLP),
        (glu.SparseGLU, mlp.SparseMLP), (glu.GroupedGLU, glu.SparseGLU), (glu.SharedGLU, mlp.SharedMLP),
    ):  # fmt: skip
        assert issubclass(sub, base)
        assert sub is not base
    assert not issubclass(mlp.MLP, mlp.SparseMLP)
    assert not issubclass(mlp.SparseMLP, mlp.MLP)
    for mlp_type, impl in product(("mlp", "glu"), ("grouped", "sparse")):
        layer = dmoe.dMoE(arguments(mlp_type=mlp_type, mlp_impl=impl, shared_expert=True, activation_fn=F.silu))
        assert type(layer.experts) is dmoe.ParallelDroplessMLP
        name = {"mlp": "MLP", "glu": "GLU"}[mlp_type]
        assert type(layer.experts.mlp).__name__ == impl.capitalize() + name
        assert type(layer.shared_expert).__name__ == "Shared" + name
    assert type(moe.MoE(arguments()).experts) is moe.ParallelMLP
    assert type(moe.MoE(arguments()).experts.mlp) is mlp.MLP
    assert moe.MoE(arguments()).shared_expert is None
