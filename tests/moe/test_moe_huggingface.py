"""`MoE` against the sparse blocks of transformers 5 with the same weights: outputs and all gradients in fp32.

transformers 5 keeps experts in the same fused layout, so that the weights are copied and not rearranged.
"""

from importlib import import_module
from typing import Any

import pytest
import torch
from dense_oracle import relative_error
from torch import nn

from dmoe.moe import MoE, MoEConfig

pytest.importorskip("transformers")

COMMON = {"hidden_size": 32, "num_experts_per_tok": 3, "hidden_act": "silu", "experts_implementation": "eager"}


def block(module: str, name: str, config: str, **fields: Any) -> nn.Module:
    """A block of transformers with random weights of order 1 / sqrt(columns)."""
    package = f"transformers.models.{module}"
    hf_config = getattr(import_module(f"{package}.configuration_{module}"), config)(**COMMON, **fields)
    theirs = getattr(import_module(f"{package}.modeling_{module}"), name)(hf_config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return theirs


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    return block("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", intermediate_size=24, num_local_experts=6), {}


def qwen3() -> tuple[nn.Module, dict[str, Any]]:
    theirs = block(
        "qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", moe_intermediate_size=24, num_experts=6,
        norm_topk_prob=True,
    )  # fmt: skip
    return theirs, {}


def olmoe() -> tuple[nn.Module, dict[str, Any]]:
    theirs = block(
        "olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", intermediate_size=24, num_experts=6, norm_topk_prob=False
    )
    return theirs, {"norm_topk_prob": False}


def deepseek_v3() -> tuple[nn.Module, dict[str, Any]]:
    """Sigmoid scores, a scaling factor and a shared expert; one group and no correction bias."""
    theirs = block(
        "deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", moe_intermediate_size=24, n_routed_experts=6,
        n_shared_experts=2, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    return theirs, {"score_function": "sigmoid", "routed_scaling_factor": 2.5, "shared_intermediate_size": 48}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("family", [mixtral, qwen3, olmoe, deepseek_v3], ids=lambda f: f.__name__)
def test_outputs_and_gradients(family: Any, backend: str) -> None:
    theirs, changes = family()
    config = MoEConfig(
        hidden_size=32, intermediate_size=24, num_experts=6, top_k=3, aux_loss_coef=0, z_loss_coef=0, backend=backend,
        **changes,
    )  # fmt: skip
    ours = MoE(config)
    state = {name.replace("gate.weight", "router.weight"): t for name, t in theirs.named_parameters()}
    ours.load_state_dict(state)

    x_theirs = torch.randn(2, 20, 32, requires_grad=True)
    x_ours = x_theirs.detach().clone().requires_grad_()
    want, got = theirs(x_theirs), ours(x_ours)
    grad = torch.randn_like(want)
    want.backward(grad)
    got.backward(grad)
    assert relative_error(got.detach(), want.detach()) <= 1e-6
    assert relative_error(x_ours.grad, x_theirs.grad) <= 1e-6
    gradients = {name.replace("gate.weight", "router.weight"): p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, gradients[name]) <= 2e-6, name
