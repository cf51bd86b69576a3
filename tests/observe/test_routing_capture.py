"""What is captured is what the routers did: against transformers, and for every kind of routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dmoe
from dmoe.config import ModelConfig, MoEConfig
from dmoe.errors import ConfigError
from dmoe.models import Decoder
from dmoe.moe import MoE
from dmoe.observe.routing import RoutingAccumulator, capture, drift, summarize

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def huggingface(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if family == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2)
        return transformers.MixtralForCausalLM(config)
    if family == "olmoe":
        return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=3))
    config = transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, moe_intermediate_size=24, num_experts=7, num_experts_per_tok=2, mlp_only_layers=[1]
    )
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_picks_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    theirs = huggingface(family).eval()
    theirs.config.output_router_logits = False
    theirs.save_pretrained(tmp_path)
    model = dmoe.from_pretrained(tmp_path)
    ids_BS = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), capture(model) as captured:
        model(ids_BS)
    routing = captured.take()
    with torch.no_grad():
        logits = theirs(ids_BS, output_router_logits=True).router_logits
    top_k = theirs.config.num_experts_per_tok
    mixtures = [0, 2] if family == "qwen3_moe" else [0, 1, 2]
    assert list(routing) == captured.layers == mixtures
    logits = [l for l in logits if l is not None and l.numel()]
    assert len(logits) == len(mixtures)
    for part, logits_TE in zip(routing.values(), logits):
        if torch.allclose(logits_TE.sum(-1), torch.ones(51), atol=1e-4):  # some versions hand out the softmax
            probs_TE = logits_TE.float()
        else:
            probs_TE = logits_TE.float().softmax(-1)
        torch.testing.assert_close(part.probs_TE, probs_TE, rtol=1e-3, atol=1e-5)
        wanted = probs_TE.topk(top_k).indices.sort().values
        assert torch.equal(part.ids_TK.sort().values, wanted)
    summary = summarize(routing, ids_BS.flatten(), top_k=top_k)
    loads = [np.bincount(l.topk(top_k).indices.flatten(), minlength=l.shape[1]) / (51 * top_k) for l in logits]
    np.testing.assert_allclose(summary.load_LE, loads)
    assert captured.take() == {}


KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"score_function": "sigmoid"},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus"},
    "groups": {"score_function": "sigmoid", "n_group": 3, "topk_group": 2, "expert_bias_rate": 0.01},
    "after_topk": {"softmax_after_topk": True},
    "capacity": {"capacity_factor": 0.5},
    "padded_capacity": {"capacity_factor": 0.6, "pad_to_capacity": True},
    "expert_choice": {"routing": "expert_choice"},
    "hash": {"routing": "hash"},
    "sinkhorn": {"routing": "sinkhorn"},
    "sparsemixer": {"routing": "sparsemixer", "norm_topk_prob": False},
    "random": {"routing": "random"},
    "uniform": {"routing": "uniform"},
    "all_experts": {"top_k": 6},
    "one_expert": {"num_experts": 1, "top_k": 1},
}


def layer_of(kind: str) -> MoE:
    sizes: dict[str, Any] = {"num_experts": 6, "top_k": 2, "hidden_size": 16, "intermediate_size": 8}
    layer = MoE(MoEConfig(**(sizes | KINDS[kind])))
    layer.reset_parameters(seed=0)
    with torch.no_grad():
        if layer.router.e_score_correction_bias is not None:
            layer.router.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, 6))
        layer.router.weight.mul_(20)
    return layer.eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_routing(kind: str, padded: bool) -> None:
    layer = layer_of(kind)
    config = layer.config
    torch.manual_seed(0)
    x_TD, tokens_T = torch.randn(48, 16), torch.randint(0, 12, (48,))
    valid_T = torch.arange(48) % 4 != 1 if padded else torch.ones(48, dtype=torch.bool)
    torch.manual_seed(1)
    with torch.no_grad(), capture(layer) as captured:
        layer(x_TD, token_mask=valid_T if padded else None, token_ids=tokens_T)
    torch.manual_seed(1)
    with torch.no_grad():
        x_TD = x_TD.masked_fill(~valid_T[:, None], 0)
        routing = layer.router(x_TD, valid_T if padded else None, tokens_T)
    summary = summarize(captured.take(), tokens_T, top_k=config.top_k)
    num_valid = int(valid_T.sum())
    assert summary.num_tokens == num_valid
    # Counts from the routing itself, token by token.
    picked = np.zeros((num_valid, config.num_experts))
    for row, t in enumerate(valid_T.nonzero().flatten().tolist()):
        if kind == "expert_choice":
            assert routing.slots is not None
            experts = [e for e in range(config.num_experts) if t in routing.slots.tokens_EC[e].tolist()]
        else:
            experts = routing.ids_before_drop[t].tolist()
        picked[row, experts] = 1
    np.testing.assert_allclose(summary.load_LE[0], picked.sum(0) / picked.sum())
    np.testing.assert_allclose(summary.coactivation_LEE[0], picked.T @ picked / num_valid, rtol=1e-6)
    for row, ids in zip(picked, summary.picks_LTK[0]):
        assert np.flatnonzero(row).tolist() == ids[ids < config.num_experts].tolist()
    np.testing.assert_allclose(summary.prob_LE.sum(), 1, rtol=1e-5)
    scores_TE = routing.scores_TE[valid_T].double()
    probs_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    np.testing.assert_allclose(summary.confidence_L[0], probs_TE.max(1).values.mean(), rtol=1e-5)
    if config.capacity_factor and kind != "expert_choice":
        assert summary.dropped_L[0] == pytest.approx(int(routing.dropped) / picked.sum())
        assert summary.dropped_L[0] > 0
    assert drift(summary, summary).equal_picks_L.tolist() == [1]


def small() -> Decoder:
    config = ModelConfig(
        vocab_size=50, hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32,
        max_seq_len=32, first_k_dense=1, moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=8),
    )  # fmt: skip
    model = Decoder(config)
    model.init_weights(0)
    return model.eval()


def test_several_forwards_are_joined_and_hooks_go_away() -> None:
    model = small()
    ids = torch.randint(0, 50, (4, 8))
    whole, parts = RoutingAccumulator.of(model), RoutingAccumulator.of(model)
    assert whole.layers == [1, 2]
    with torch.no_grad(), capture(model) as captured:
        model(ids)
        whole.add_layers(captured.take(), ids.flatten())
        for row in ids:
            model(row[None])
        parts.add_layers(captured.take(), ids.flatten())
    np.testing.assert_array_equal(whole.summary().picks_LTK, parts.summary().picks_LTK)
    np.testing.assert_allclose(whole.summary().entropy_L, parts.summary().entropy_L, rtol=1e-6)
    with torch.no_grad():
        model(ids)
    assert captured.take() == {}
    with pytest.raises(ZeroDivisionError), capture(model):
        raise ZeroDivisionError
    assert not any(layer.mlp.router._forward_hooks for layer in model.blocks if isinstance(layer.mlp, MoE))


def test_a_compiled_model_is_heard() -> None:
    model = small()
    ids = torch.randint(0, 50, (2, 8))
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        model(ids)  # compiled before anybody listens
        with capture(model) as captured:
            model(ids)
    assert {layer: part.ids_TK.shape for layer, part in captured.take().items()} == {1: (16, 2), 2: (16, 2)}


def test_a_forward_that_is_recomputed_counts_once() -> None:
    model = small().train()
    model.activation_checkpointing = True
    ids = torch.randint(0, 50, (2, 8))
    with capture(model) as captured:
        model(ids).sum().backward()
    assert {len(part.ids_TK) for part in captured.take().values()} == {16}


def test_a_dense_model_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="model is 'Linear': must be one with MoE layers"),
        capture(torch.nn.Linear(2, 2)),
    ):
        pass
