"""`route` against the routers of transformers 5: weights over all experts, and the gradient of the router."""

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.ops import route

pytest.importorskip("transformers")

E, K, D, T = 12, 4, 32, 200
GROUPS = {"n_group": 4, "topk_group": 2}
MIXTRAL = {"score_function": "softmax", "normalize": True}
AFTER = {"score_function": "softmax", "normalize": False, "softmax_after_topk": True}
V3 = {"score_function": "sigmoid", "normalize": True, "scaling_factor": 2.5, "group_score_top": 2}

ROUTERS: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("mixtral", "MixtralTopKRouter", "MixtralConfig", {"num_local_experts": E}, MIXTRAL),
    "mixtral after": ("mixtral", "MixtralTopKRouter", "MixtralConfig", {"num_local_experts": E}, AFTER),
    "olmoe": (
        "olmoe", "OlmoeTopKRouter", "OlmoeConfig", {"num_experts": E, "norm_topk_prob": False},
        {"score_function": "softmax", "normalize": False},
    ),
    "qwen2": (
        "qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeConfig", {"num_experts": E, "norm_topk_prob": False},
        {"score_function": "softmax", "normalize": False},
    ),
    "qwen3": ("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", {"num_experts": E, "norm_topk_prob": True}, MIXTRAL),
    "deepseek v3": (
        "deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config",
        {"n_routed_experts": E, "norm_topk_prob": True, "routed_scaling_factor": 2.5, **GROUPS}, {**V3, **GROUPS},
    ),
    "deepseek v3, E groups of 2": (
        "deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config",
        {"n_routed_experts": E, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 6, "topk_group": 3},
        {"score_function": "sigmoid", "normalize": False, "n_group": 6, "topk_group": 3, "group_score_top": 2},
    ),
    "deepseek v2": (
        "deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config",
        {"n_routed_experts": E, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, **GROUPS},
        {"score_function": "softmax", "normalize": False, "scaling_factor": 16.0, "group_score_top": 1, **GROUPS},
    ),
    "deepseek v2 greedy": (
        "deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config",
        {"n_routed_experts": E, "topk_method": "greedy", "routed_scaling_factor": 1.0},
        {"score_function": "softmax", "normalize": False},
    ),
    "deepseek v4": (
        "deepseek_v4", "DeepseekV4TopKRouter", "DeepseekV4Config",
        {"n_routed_experts": E, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
        {"score_function": "sqrtsoftplus", "normalize": True, "scaling_factor": 1.5},
    ),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", "GptOssConfig", {"num_local_experts": E}, AFTER),
    "granite": ("granitemoe", "GraniteMoeTopKRouter", "GraniteMoeConfig", {"num_local_experts": E}, AFTER),
    "llama 4": (
        "llama4", "Llama4Router", "Llama4TextConfig", {"num_local_experts": E, "num_experts_per_tok": 1},
        {"score_function": "sigmoid", "normalize": False},
    ),
}  # fmt: skip


def make_router(module: str, name: str, config: str, fields: dict[str, Any]) -> nn.Module:
    package = f"transformers.models.{module}"
    values = {"hidden_size": D, "num_experts_per_tok": K, **fields}
    hf_config = getattr(import_module(f"{package}.configuration_{module}"), config)(**values)
    router = getattr(import_module(f"{package}.modeling_{module}"), name)(hf_config).float()
    with torch.no_grad():
        for tensor in [*router.parameters(), *router.buffers()]:
            tensor.normal_(std=0.5)
    return router


def dense(ids: Tensor, weights: Tensor) -> Tensor:
    return weights.new_zeros(ids.shape[0], E).scatter(1, ids, weights)


@pytest.mark.parametrize("family", ROUTERS)
def test_dense_weights_and_gradient(family: str) -> None:
    module, name, config, fields, options = ROUTERS[family]
    router = make_router(module, name, config, fields)
    x = torch.randn(T, D)
    results = router(x)
    want = results[0] if family == "llama 4" else dense(results[2], results[1])

    weight = router.weight.detach().clone().requires_grad_()
    logits = F.linear(x, weight, getattr(router, "bias", None))
    top_k = fields.get("num_experts_per_tok", K)
    bias = getattr(router, "e_score_correction_bias", None)
    _, ids, weights = route(logits, top_k, bias_E=bias, **options)
    got = dense(ids, weights)
    assert torch.equal(got != 0, want != 0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)

    grad = torch.randn(T, E)
    (want_grad,) = torch.autograd.grad((want * grad).sum(), router.weight)
    (got_grad,) = torch.autograd.grad((got * grad).sum(), weight)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-4, atol=1e-5)
