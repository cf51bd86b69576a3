"""OLMoE's configuration, losses, parameter groups and counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.dmoe import dMoE
from dmoe.compat.megablocks.layers.moe import MoE, batched_load_balancing_loss, get_load_balancing_loss
from dmoe.errors import ConfigError
from dmoe.integrations.olmoe import clear_moe_losses, config_to_moe_args, moe_losses, num_params, param_groups

# Field by field the model section of the published configurations of OLMoE-1B-7B.
PUBLISHED = {
    "d_model": 2048, "n_heads": 16, "n_layers": 16, "mlp_ratio": 1, "weight_tying": False, "include_bias": False,
    "block_type": "moe", "activation_type": "swiglu", "vocab_size": 50280, "embedding_size": 50304,
    "init_device": "meta", "moe_top_k": 8, "moe_num_experts": 64, "moe_dropless": True, "moe_mlp_impl": "sparse",
    "moe_zloss_weight": 0.001, "moe_loss_weight": 0.01,
}  # fmt: skip
SMALL = PUBLISHED | {
    "d_model": 16, "n_layers": 3, "embedding_size": 40, "moe_num_experts": 6, "moe_top_k": 2, "init_device": "cpu"
}  # fmt: skip


class Block(nn.Module):
    """OLMoE's block without its arithmetic: attention with normalised queries and keys, norms, mixture."""

    def __init__(self, args: Arguments, dropless: bool) -> None:
        super().__init__()
        kwargs = {"device": args.device}
        width = args.hidden_size
        self.att_proj = nn.Linear(width, 3 * width, bias=args.bias, **kwargs)
        self.attn_out = nn.Linear(width, width, bias=args.bias, **kwargs)
        self.q_norm, self.k_norm, self.attn_norm, self.ff_norm = (nn.RMSNorm(width, **kwargs) for _ in range(4))
        self.ffn = dMoE(args) if dropless else MoE(args)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.ff_norm(x))


class Model(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.args = config_to_moe_args(SimpleNamespace(**config))
        size, kwargs = (config["embedding_size"], config["d_model"]), {"device": config["init_device"]}
        self.wte = nn.Embedding(*size, **kwargs)
        self.blocks = nn.ModuleList(Block(self.args, config["moe_dropless"]) for _ in range(config["n_layers"]))
        self.ln_f = nn.RMSNorm(config["d_model"], **kwargs)
        self.ff_out = nn.Linear(*reversed(size), bias=False, **kwargs)
        if config["weight_tying"]:
            self.ff_out.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x)
        return self.ff_out(self.ln_f(x))


# ---- configuration


def test_published_configuration() -> None:
    args = config_to_moe_args(PUBLISHED)
    assert (args.hidden_size, args.ffn_hidden_size, args.num_layers) == (2048, 1024, 16)
    assert (args.moe_num_experts, args.moe_top_k, args.mlp_type, args.mlp_impl) == (64, 8, "glu", "sparse")
    assert (args.moe_loss_weight, args.moe_zloss_weight, args.moe_capacity_factor) == (0.01, 0.001, 1.25)
    assert (args.fp16, args.bf16, args.bias, args.return_bias, args.shared_expert) == (False,) * 5
    assert args.activation_fn is F.silu
    assert args.device == torch.device("meta")
    assert args.moe_normalize_expert_weights is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mlp_hidden_size": 100}, {"ffn_hidden_size": 50}),
        ({"activation_type": "gelu"}, {"ffn_hidden_size": 2048, "mlp_type": "mlp", "activation_fn": F.gelu}),
        ({"activation_type": "relu"}, {"mlp_type": "mlp", "activation_fn": F.relu}),
        ({"moe_interleave": True}, {"num_layers": 8}),
        ({"moe_zloss_weight": None}, {"moe_zloss_weight": 0}),
        ({"moe_shared_expert": True}, {"shared_expert": True}),
        ({"moe_lbl_in_fp32": True}, {"moe_lbl_in_fp32": True}),
        ({"include_bias": True}, {"bias": True}),
        ({"moe_capacity_factor": 2.5}, {"moe_capacity_factor": 2.5}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_configuration_fields(change: dict[str, Any], expected: dict[str, Any]) -> None:
    for config in (PUBLISHED | change, SimpleNamespace(**PUBLISHED | change)):
        args = config_to_moe_args(config)
        assert {name: getattr(args, name) for name in expected} == expected


def test_configuration_errors() -> None:
    with pytest.raises(ConfigError, match="no field moe_num_experts: must have it"):
        config_to_moe_args({name: value for name, value in PUBLISHED.items() if name != "moe_num_experts"})
    with pytest.raises(ConfigError, match="activation_type is 'swish': must be one of swiglu, gelu, relu"):
        config_to_moe_args(PUBLISHED | {"activation_type": "swish"})


# ---- counts


def test_published_counts() -> None:
    model = Model(PUBLISHED)
    embedding, d, f = 50304 * 2048, 2048, 1024
    layer = 4 * d * d + 4 * d + 64 * d  # attention, norms, router
    assert num_params(model) == 2 * embedding + 16 * (layer + 64 * 3 * d * f) + d == 6_919_161_856
    assert num_params(model, include_inactive_params=False) == 1_282_017_280
    assert 2 * embedding + 16 * (layer + 8 * 3 * d * f) + d == 1_282_017_280
    assert num_params(model, include_embedding=False) == 6_919_161_856 - embedding


@pytest.mark.parametrize("dropless", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_counts(dropless: bool, tied: bool) -> None:
    config = SMALL | {"moe_dropless": dropless, "weight_tying": tied, "include_bias": True, "moe_shared_expert": True}
    model = Model(config)
    assert num_params(model) == sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() * 4 // 6 for name, p in model.named_parameters() if ".experts.mlp." in name)
    assert num_params(model, include_inactive_params=False) == num_params(model) - idle
    assert num_params(model, include_embedding=False) == num_params(model) - 40 * 16


# ---- losses


def reference_losses(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas in float64, one layer after another; no layer here looks at another position."""
    x, config = model.wte(ids).double(), model.args
    balancing, z_loss = [], []
    for block in model.blocks:
        normed = F.rms_norm(x, x.shape[-1:], block.ff_norm.weight.double(), eps=torch.finfo(torch.float32).eps)
        logits = (normed @ block.ffn.router.layer.weight.double().t()).flatten(0, -2)
        scores = logits.softmax(-1)
        chosen = scores.topk(config.moe_top_k).indices
        num_picks = chosen.numel()
        for e in range(config.moe_num_experts):
            balancing.append((chosen == e).sum() * scores[:, e].mean() * config.moe_num_experts / num_picks)
        z_loss.append(logits.exp().sum(-1).log().square().sum() / num_picks)
        x = x + block.ffn(normed.float()).double()
    layers = len(model.blocks)
    return config.moe_loss_weight * sum(balancing) / layers, config.moe_zloss_weight * sum(z_loss) / layers


@pytest.mark.parametrize("dropless", [True, False])
@pytest.mark.parametrize("fork", [True, False])
def test_losses_and_their_gradients(dropless: bool, fork: bool) -> None:
    """With the fork's protocol, which OLMoE's configuration asks for, and with that of MegaBlocks' main."""
    clear_moe_losses()
    model = Model(SMALL | {"moe_dropless": dropless, "moe_capacity_factor": 0 if dropless else 6.0})
    if not fork:
        model.args.moe_weight_parallelism = None
    routers = [block.ffn.router.layer.weight for block in model.blocks]
    for weight in routers:
        nn.init.normal_(weight, std=0.5)
    ids = torch.randint(40, (3, 11))
    model(ids)
    losses = moe_losses(model.args)
    # OLMoE's trainer unpacks the pair itself.
    assert isinstance(batched_load_balancing_loss(model.args), tuple) == fork
    assert {len(entry) for entry in get_load_balancing_loss()} == {3 if fork else 2}
    clear_moe_losses()
    with torch.no_grad():
        expected = reference_losses(model.eval(), ids)
    model.train()
    for got, wanted in zip(losses, expected):
        assert got.dim() == 0
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)
    for got, wanted in zip(losses, reference_losses(model, ids)):
        actual = torch.autograd.grad(got, routers, retain_graph=True)
        for a, b in zip(actual, torch.autograd.grad(wanted, routers, retain_graph=True)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
            assert a.abs().max() > 0
    clear_moe_losses()


@pytest.mark.parametrize(("balancing", "z_loss"), [(0.0, 0.001), (0.01, 0.0), (0.01, None), (0.0, 0.0)])
def test_losses_that_are_off(balancing: float, z_loss: float | None) -> None:
    clear_moe_losses()
    model = Model(SMALL | {"moe_loss_weight": balancing, "moe_zloss_weight": z_loss})
    ids = torch.randint(40, (2, 5))
    model(ids)
    losses = moe_losses(model.args)
    assert [float(torch.as_tensor(loss).detach()) > 0 for loss in losses] == [balancing > 0, bool(z_loss)]
    assert sum(torch.as_tensor(losses[i]).requires_grad for i in range(2)) == (balancing > 0) + bool(z_loss)
    clear_moe_losses()
    model.eval()(ids)
    assert not get_load_balancing_loss()


def test_micro_batches_add_up() -> None:
    """Cleared in between, losses of micro-batches of equal size are what their mean is."""
    clear_moe_losses()
    model = Model(SMALL)
    parts = []
    for ids in torch.randint(40, (4, 2, 5)):
        model(ids)
        parts.append(moe_losses(model.args)[1] / 4)
        clear_moe_losses()
    assert len(parts) == 4
    total = sum(parts)
    assert total.item() == pytest.approx(torch.stack(parts).mean().item() * 4)


# ---- parameter groups


def names_in(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("dropless", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("embeddings", [True, False])
def test_every_parameter_is_in_one_group(dropless: bool, tied: bool, norms: bool, embeddings: bool) -> None:
    config = SMALL | {"moe_dropless": dropless, "weight_tying": tied, "include_bias": True, "moe_shared_expert": True}
    model = Model(config)
    groups = param_groups(model, 0.1, decay_norm_and_bias=norms, decay_embeddings=embeddings)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    assert {group["name"]: group["weight_decay"] for group in groups}.items() <= {"decay": 0.1, "no_decay": 0.0}.items()
    plain = {n for n in dict(model.named_parameters()) if "norm" in n or n.startswith("ln_f") or n.endswith("bias")}
    matrices = set(dict(model.named_parameters())) - plain - {"wte.weight"}
    decayed = names_in(model, groups).get("decay", set())
    assert decayed == matrices | (plain if norms else set()) | ({"wte.weight"} if embeddings else set())
    experts = {f"blocks.0.ffn.experts.mlp.{name}" for name in (("w1", "w2", "v1") if dropless else ("w1", "w2"))}
    assert experts | {"blocks.0.ffn.router.layer.weight"} <= decayed
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert {g["weight_decay"] for g in optimizer.param_groups} <= {0.1, 0.0}


def test_unknown_parameter_is_named() -> None:
    model = Model(SMALL)
    model.blocks[1].register_parameter("scale", nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(ConfigError, match=r"parameter blocks.1.scale of a Block is \(2, 2\)"):
        param_groups(model, 0.1)
