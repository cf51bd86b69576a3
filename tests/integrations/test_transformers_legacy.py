"""`replace_moe` on blocks in the layout of transformers 4.5x, written here, against the blocks of transformers 5."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
from transformers_models import error

from dmoe.errors import ConfigError
from dmoe.integrations.transformers import replace_moe

D, WIDTH, E = 32, 24, 6


class MLP(nn.Module):
    """An expert: w1, w3, w2 in Mixtral, and the long names elsewhere."""

    def __init__(self, names: tuple[str, str, str], width: int = WIDTH) -> None:
        super().__init__()
        self.names = names
        for name, shape in zip(names, ((D, width), (D, width), (width, D))):
            self.add_module(name, nn.Linear(*shape, bias=False))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class Block(nn.Module):
    """A block of 4.5x: every expert on the tokens that chose it, and the router's logits beside the result."""

    names = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, top_k: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = E, top_k
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(MLP(self.names) for _ in range(E))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.view(-1, D)
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1, dtype=torch.float).topk(self.top_k, dim=-1)
        if getattr(self, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, k = torch.where(chosen == e)
            y = y.index_add(0, tokens, expert(x[tokens]) * weights[tokens, k, None].to(x.dtype))
        if hasattr(self, "shared_expert"):
            y = y + F.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y.view_as(hidden_states), logits


class MixtralSparseMoeBlock(Block):
    names = ("w1", "w3", "w2")

    def __init__(self, top_k: int = 2) -> None:
        super().__init__(top_k)
        self.jitter_noise = 0.0


class OlmoeSparseMoeBlock(Block):
    norm_topk_prob = False


class Qwen3MoeSparseMoeBlock(Block):
    norm_topk_prob = True


class Qwen2MoeSparseMoeBlock(Block):
    norm_topk_prob = False

    def __init__(self, top_k: int = 2) -> None:
        super().__init__(top_k)
        self.shared_expert = MLP(self.names, 40)
        self.shared_expert_gate = nn.Linear(D, 1, bias=False)


BLOCKS = [MixtralSparseMoeBlock, OlmoeSparseMoeBlock, Qwen3MoeSparseMoeBlock, Qwen2MoeSparseMoeBlock]
KINDS = dict(zip(BLOCKS, ["mixtral", "olmoe", "qwen3_moe", "qwen2_moe"]))


class Model(nn.Module):
    """Two blocks with residuals."""

    def __init__(self, block: type[Block], **fields: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": block(**fields)}) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = []
        for layer in self.layers:
            y, of_layer = layer["mlp"](x)
            x = x + y
            logits.append(of_layer)
        return x, logits


def in_v5(block: Block) -> Any:
    """transformers 5's block with the same weights, computed by its eager code."""
    import transformers.models as v5
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = KINDS[type(block)]
    config = CONFIG_MAPPING[kind](
        hidden_size=D, intermediate_size=WIDTH, moe_intermediate_size=WIDTH, num_local_experts=E, num_experts=E,
        num_experts_per_tok=block.top_k, shared_expert_intermediate_size=40, experts_implementation="eager",
        **({} if kind == "mixtral" else {"norm_topk_prob": block.norm_topk_prob}),
    )  # fmt: skip
    module = getattr(getattr(v5, kind), f"modeling_{kind}")
    theirs = getattr(module, type(block).__name__)(config)
    old, new = block.state_dict(), {}
    for key in theirs.state_dict():
        if key == "experts.gate_up_proj":
            parts = [[old[f"experts.{e}.{name}.weight"] for name in block.names[:2]] for e in range(E)]
            new[key] = torch.stack([torch.cat(gate_and_up) for gate_and_up in parts])
        elif key == "experts.down_proj":
            new[key] = torch.stack([old[f"experts.{e}.{block.names[2]}.weight"] for e in range(E)])
        else:
            new[key] = old[key]
    theirs.load_state_dict(new)
    return theirs


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("top_k", [1, 3, E])
def test_against_version_5(kind: type[Block], top_k: int) -> None:
    block = kind(top_k)
    theirs = in_v5(block)
    assert replace_moe(block) == [""]
    x = torch.randn(2, 7, D)
    ours_x, theirs_x = (x.clone().requires_grad_() for _ in range(2))
    y, logits = block(ours_x)
    want = theirs(theirs_x)
    grad = torch.randn_like(want)
    y.backward(grad)
    want.backward(grad)
    assert error(y, want) <= 2e-6
    assert error(ours_x.grad, theirs_x.grad) <= 2e-6
    assert torch.equal(logits, theirs_x.view(-1, D) @ theirs.gate.weight.t())
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    ours = {name: p.grad for name, p in block.named_parameters()}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # With one expert that always has weight 1 the router has no gradient but rounding.
        assert error(ours[name], gradient) <= 5e-6 or (gradient.abs().max() < 1e-6), name


@pytest.mark.parametrize("kind", BLOCKS)
def test_against_the_blocks_replaced(kind: type[Block]) -> None:
    model = Model(kind)
    old = copy.deepcopy(model)
    assert replace_moe(model) == ["layers.0.mlp", "layers.1.mlp"]
    assert all(isinstance(m["mlp"], kind) for m in model.layers)
    assert type(model.layers[0]["mlp"]) is type(model.layers[1]["mlp"])
    for batch in (torch.randn(2, 5, D), torch.randn(1, 1, D), torch.randn(1, 0, D)):
        (y, logits), (want, want_logits) = model(batch), old(batch)
        assert y.shape == want.shape
        torch.testing.assert_close((y, logits), (want, want_logits), rtol=1e-5, atol=1e-6)
    assert replace_moe(model) == ["layers.0.mlp", "layers.1.mlp"]  # again: as it is


def test_bf16_and_autocast() -> None:
    model = Model(MixtralSparseMoeBlock)
    exact, bf16 = copy.deepcopy(model), copy.deepcopy(model).bfloat16()
    replace_moe(model)
    replace_moe(bf16)
    x = torch.randn(1, 6, D)
    want = exact.layers[0]["mlp"](x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got, logits = model.layers[0]["mlp"](x)
    assert (got.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    assert 1e-5 < error(got, want) < 0.03
    y, logits = bf16.layers[0]["mlp"](x.bfloat16())
    assert (y.dtype, logits.dtype) == (torch.bfloat16, torch.bfloat16)
    assert error(y, want) < 0.03


@pytest.mark.parametrize("kind", BLOCKS)
def test_state_dict_has_the_old_names(kind: type[Block], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Model(kind)
    old = {name: t.clone() for name, t in model.state_dict().items()}
    replace_moe(model)
    new = model.state_dict()
    assert list(new) == list(old)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert "layers.0.mlp.experts.gate_up_proj" in dict(model.named_parameters())
    save_file(dict(new), tmp_path / "model.safetensors")  # which refuses tensors that overlap
    saved = load_file(tmp_path / "model.safetensors")

    fresh = Model(kind)
    replace_moe(fresh)
    x = torch.randn(1, 5, D)
    assert not torch.equal(fresh(x)[0], model(x)[0])
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(x)[0], model(x)[0])
    Model(kind).load_state_dict(saved)  # a model that was not replaced

    with torch.device("meta"):
        empty = Model(kind)
    replace_moe(empty)
    empty.load_state_dict({name: t.bfloat16() for name, t in saved.items()}, assign=True)
    assert {p.dtype for p in empty.parameters()} == {torch.bfloat16}
    assert error(empty(x.bfloat16())[0], model(x)[0]) < 0.05


def test_state_dicts_that_do_not_fit() -> None:
    model = Model(OlmoeSparseMoeBlock)
    replace_moe(model)
    state = model.state_dict()
    key = "layers.1.mlp.experts.3.up_proj.weight"
    state["layers.1.mlp.experts.6.up_proj.weight"] = state.pop(key)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*experts\.3\.up_proj.*Unexpected.*experts\.6\.up_proj"):
        model.load_state_dict(state)
    found = model.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([key], [key.replace(".3.", ".6.")])
    state = model.state_dict() | {key: torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for layers\.1.*up_proj.weight: \(3,\), must be \(24, 32\)"):
        model.load_state_dict(state)


def test_frozen_experts_stay_frozen() -> None:
    model = Model(Qwen3MoeSparseMoeBlock)
    for expert in model.layers[0]["mlp"].experts:
        expert.down_proj.weight.requires_grad_(False)
    replace_moe(model)
    names = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert names == {"layers.0.mlp.experts.down_proj"}
    model(torch.randn(1, 5, D))[0].sum().backward()
    assert model.layers[0]["mlp"].experts.down_proj.grad is None
    assert model.layers[0]["mlp"].experts.gate_up_proj.grad is not None


def test_jitter_only_in_training() -> None:
    block = MixtralSparseMoeBlock()
    block.jitter_noise = 0.1
    replace_moe(block)
    x = torch.randn(1, 5, D)
    assert not torch.equal(block(x)[1], block(x)[1])
    assert torch.equal(block.eval()(x)[1], block(x)[1])


def test_copies_and_another_activation() -> None:
    block = MixtralSparseMoeBlock()
    for expert in block.experts:
        expert.act_fn = nn.Hardswish()
    old = copy.deepcopy(block)
    replace_moe(block)
    x = torch.randn(1, 5, D)
    assert error(copy.deepcopy(block)(x)[0], old(x)[0]) <= 2e-6


def test_compiled_in_one_graph() -> None:
    block = Qwen2MoeSparseMoeBlock()
    replace_moe(block)
    x = torch.randn(1, 5, D)
    got = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, block(x))


class OtherSparseMoeBlock(Block):
    pass


def _mixed_training(block: Block) -> None:
    block.experts[2].up_proj.weight.requires_grad_(False)


def _with_bias(block: Block) -> None:
    block.experts[1].down_proj = nn.Linear(WIDTH, D)


def _hooked(block: Block) -> None:
    block.forward = block.forward  # type: ignore[method-assign]


def _other_dtype(block: Block) -> None:
    block.experts[5].bfloat16()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_mixed_training, r"layers.1.mlp.experts.2.up_proj.weight.requires_grad is False: must be True"),
        (_with_bias, r"layers.1.mlp.experts.1.down_proj is Linear.*: must be nn.Linear without bias"),
        (_hooked, r"layers.1.mlp.forward is 'replaced by a hook'"),
        (_other_dtype, r"experts.5.gate_proj.weight.dtype is torch.bfloat16: must be torch.float32"),
    ],
)
def test_refused_and_unchanged(spoil: Any, message: str) -> None:
    model = Model(OlmoeSparseMoeBlock)
    spoil(model.layers[1]["mlp"])
    with pytest.raises(ConfigError, match=message):
        replace_moe(model)
    assert type(model.layers[0]["mlp"]) is OlmoeSparseMoeBlock
    assert isinstance(model.layers[0]["mlp"].experts, nn.ModuleList)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), OtherSparseMoeBlock()], ids=["no block", "another router, maybe"])
def test_nothing_to_replace(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="has no block that replace_moe knows"):
        replace_moe(model)
