"""The layers of the MegaBlocks interface against loops in plain torch: values, gradients, and what they return."""

from __future__ import annotations

import copy
from functools import partial
from itertools import product
from typing import Any

import megablocks_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from megablocks_oracle import arguments
from torch import Tensor, nn

import dmoe.compat.megablocks as megablocks
from dmoe.compat.megablocks.layers import dmoe, expert_compute, gelu, glu, mlp, moe, router
from dmoe.errors import ConfigError

CLASSES = {"dMoE": dmoe.dMoE, "MoE": moe.MoE}
# (bias, return_bias), shared expert, p of the norm
OPTIONS = list(product(((True, True), (True, False), (False, True)), ("", "sum", "mean"), (None, 1)))


@pytest.fixture(autouse=True)
def _no_saved_losses():
    yield
    moe.clear_load_balancing_loss()
    router.clear_router_zloss()


def added(out: Any) -> Tensor:
    """A layer's output with its bias, however it is returned."""
    return out[0] + out[1] if isinstance(out, tuple) else out


def backward(loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(inputs.items(), grads)}


def compare(layer: nn.Module, x: Tensor, args: Any, act: Any, *, exact: bool, tolerance: float = 0.0) -> None:
    """Output, balancing loss and all gradients of one layer against the loops."""
    dropless = isinstance(layer, dmoe.dMoE)
    coefficients = torch.randint(-2, 3, x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    ours_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = oracle.parameters_of(layer)
    want = oracle.forward(weights, their_x, args, act, dropless)
    moe.clear_load_balancing_loss()
    got = added(layer(ours_x))
    ((counts, scores),) = moe.get_load_balancing_loss()
    assert counts.dtype == torch.int32
    assert counts.tolist() == want.counts.tolist()
    scale = args.moe_num_experts * args.moe_loss_weight / (max(1, len(scores)) * args.moe_top_k)
    want_lbl = scale * (want.counts.to(x.dtype) * want.scores.sum(0)).sum() / max(1, len(scores))
    got_lbl = moe.batched_load_balancing_loss(args)
    pairs = [("out", got, want.out), ("scores", scores, want.scores), ("lbl", got_lbl, want_lbl)]
    got_grads = backward((got * coefficients).sum() + got_lbl, {"x": ours_x, **dict(layer.named_parameters())})
    want_grads = backward((want.out * coefficients).sum() + want_lbl, {"x": their_x, **weights})
    assert got_grads.keys() == want_grads.keys()
    pairs += [(name, got_grads[name], want_grads[name]) for name in want_grads]
    for name, ours, theirs in pairs:
        assert ours.shape == theirs.shape, name
        if exact:
            assert torch.equal(ours, theirs), (name, ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("num_experts", [1, 2, 5, 8])
@pytest.mark.parametrize(("cls", "mlp_type"), [("dMoE", "mlp"), ("dMoE", "glu"), ("MoE", "mlp")])
def test_equal_bit_by_bit_where_fp32_is_exact(cls: str, mlp_type: str, num_experts: int) -> None:
    for i, (top_k, options) in enumerate(product(sorted({1, min(2, num_experts), num_experts}), OPTIONS)):
        (bias, return_bias), shared, norm = options
        if shared == "mean" and top_k not in (1, 3):
            shared = "sum"  # a mean over a number of experts that is no power of two rounds
        args = arguments(
            moe_num_experts=num_experts, moe_top_k=top_k, bias=bias, return_bias=return_bias, mlp_type=mlp_type,
            shared_expert=bool(shared), shared_expert_weighted_sum=shared == "mean",
            moe_normalize_expert_weights=norm, activation_fn=F.relu, moe_loss_weight=0.5,
            memory_optimized_mlp=i % 5 < 2, mlp_impl=("grouped", "sparse")[i % 7 % 2],
            moe_capacity_factor=(0, 1, 0.5)[i // 5 % 3],
        )  # fmt: skip
        layer = CLASSES[cls](args)
        oracle.make_exact(layer, seed=i)
        shape = ((2, 4, 12), (8, 12), (1, 12))[i // 7 % 3]
        compare(layer, oracle.exact_input(shape, num_experts, seed=i), args, F.relu, exact=True)


@pytest.mark.parametrize("cls", CLASSES)
def test_no_token(cls: str) -> None:
    for shape, act in product([(0, 12), (2, 0, 12)], [F.relu, torch.tanh]):
        args = arguments(moe_num_experts=3, moe_top_k=2, activation_fn=act, shared_expert=True, return_bias=False)
        layer = CLASSES[cls](args)
        compare(layer, torch.zeros(shape), args, act, exact=True)


def softplus_shifted(x: Tensor) -> Tensor:
    return F.softplus(x) + 0.25  # not 0 at 0


ACTIVATIONS = {
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    "gelu": (F.gelu, "gelu"),
    "gelu_partial": (partial(F.gelu, approximate="none"), "gelu"),
    "gelu_module": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "megablocks_gelu": (gelu.gelu, "gelu_tanh"),
    "silu": (F.silu, "silu"),
    "silu_module": (nn.SiLU(), "silu"),
    "relu_partial": (partial(F.relu, inplace=False), "relu"),
    "leaky": (partial(F.leaky_relu, negative_slope=0.3), None),
    "own": (softplus_shifted, None),
    "own_lambda": (lambda x: x * x.sigmoid(), None),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    act, known_as = ACTIVATIONS[name]
    assert expert_compute.activation_name(act) == known_as
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        for mlp_type, memory in ("mlp", False), ("glu", True), ("glu", False):
            args = arguments(
                hidden_size=6, ffn_hidden_size=5, moe_num_experts=5, moe_top_k=2, mlp_type=mlp_type, activation_fn=act,
                memory_optimized_mlp=memory, moe_normalize_expert_weights=2, init_method=nn.init.normal_,
            )  # fmt: skip
            torch.manual_seed(0)
            layer = dmoe.dMoE(args).to(dtype)
            compare(layer, torch.randn(3, 4, 6, dtype=dtype) / 4, args, act, exact=False, tolerance=tolerance)


def test_unknown_options_of_an_activation_are_not_ignored() -> None:
    hooked = nn.SiLU()
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    for function in (partial(F.gelu, approximate="other"), partial(torch.add, 1), hooked, nn.ELU(), partial(F.silu, 3)):
        assert expert_compute.activation_name(function) is None


def test_capacity_that_drops_nothing_equals_dropless_bit_by_bit() -> None:
    for act, factor in product((F.gelu, torch.tanh), (0, 5)):
        shared = {"moe_num_experts": 5, "moe_top_k": 2, "activation_fn": act, "return_bias": False}
        dropless = dmoe.dMoE(arguments(**shared))
        args = arguments(**shared, moe_capacity_factor=factor)
        layer = moe.MoE(args)
        state = dropless.state_dict()
        for name in ("w1", "w2"):
            state[f"experts.mlp.{name}"] = state[f"experts.mlp.{name}"].view(5, 8, 12)
        state["experts.mlp.w1"] = state["experts.mlp.w1"].transpose(1, 2)
        layer.load_state_dict(state)
        x = torch.randn(2, 9, 12)
        grads = []
        for module in (layer, dropless):
            leaf = x.clone().requires_grad_()
            out = module(leaf)
            grads.append((out, *torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])))
        names = ["out", "x", *dict(layer.named_parameters())]
        for name, ours, theirs in zip(names, *grads):
            theirs = theirs.view(5, 8, 12) if ".mlp." in name else theirs
            assert torch.equal(ours, theirs.transpose(1, 2) if name.endswith("w1") else theirs), (act, name)


def test_frozen_weights_and_inputs() -> None:
    """In the memory-optimised mode too, for the known and for another activation."""
    for act, mlp_type in product((F.silu, torch.tanh), ("mlp", "glu")):
        args = arguments(
            moe_num_experts=3, moe_top_k=2, mlp_type=mlp_type, activation_fn=act, memory_optimized_mlp=True,
            return_bias=False, init_method=nn.init.normal_,
        )  # fmt: skip
        layer, x = dmoe.dMoE(args), torch.randn(7, 12)
        full = x.clone().requires_grad_()
        wanted = dict(layer.named_parameters(), x=full)
        want = backward(layer(full).square().sum(), wanted)
        for trained in (["x"], ["experts.mlp.w2"], ["experts.mlp.w1", "router.layer.weight"], ["experts.bias"]):
            for name, p in layer.named_parameters():
                p.requires_grad_(name in trained)
            leaf = x.clone().requires_grad_("x" in trained)
            layer(leaf).square().sum().backward()
            for name in wanted:
                p = leaf if name == "x" else layer.get_parameter(name)
                assert (p.grad is None) == (name not in trained), name
                assert p.grad is None or torch.equal(p.grad, want[name]), name
                p.grad = None
            for p in layer.parameters():
                p.requires_grad_(True)


def test_half_precision_and_autocast() -> None:
    torch.manual_seed(0)
    for dtype, act in product((torch.bfloat16, torch.float16), (F.silu, torch.tanh)):
        args = arguments(
            moe_num_experts=4, moe_top_k=2, activation_fn=act, mlp_type="glu", init_method=nn.init.normal_,
            fp16=dtype == torch.float16, bf16=dtype == torch.bfloat16, return_bias=False,
        )  # fmt: skip
        layer = dmoe.dMoE(args)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        x = (torch.randn(16, 12) / 4).to(dtype)
        double = copy.deepcopy(layer).double()
        scores, weights, ids = layer.router(x)
        want = double.experts(x.double(), scores.double(), weights.double(), ids)
        got = layer.experts(x, scores, weights, ids)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02 * want.abs().max().item())
    args = arguments(moe_num_experts=4, moe_top_k=2, return_bias=False)
    layer = moe.MoE(args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(8, 12, requires_grad=True))
    assert out.dtype == torch.promote_types(torch.bfloat16, layer.experts.bias.dtype)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_router_options() -> None:
    args = arguments(moe_num_experts=4, moe_top_k=2, moe_jitter_eps=0.25, init_method=nn.init.normal_)
    layer, x = router.LearnedRouter(args), torch.randn(3, 5, 12)
    torch.manual_seed(7)
    got = layer(x)
    torch.manual_seed(7)
    noise = 0.75 + torch.rand(x.size()) * 0.5
    want = oracle.route((x * noise).view(-1, 12) @ layer.layer.weight.t(), args)
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs)
    args.moe_jitter_eps = 0.0  # draws all the same, so that a seeded run stays as it was
    before = torch.get_rng_state()
    assert torch.equal(layer(x)[0], layer.eval()(x)[0])
    assert not torch.equal(before, torch.get_rng_state())

    args.uniform_expert_assignment = True
    scores, weights, ids = layer(x)
    assert ids.flatten().tolist() == [i % 4 for i in range(30)]
    assert torch.equal(weights, scores.topk(2).values)


def test_wrappers_and_replaced_weights() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any) -> Any:
            return self.module(*args)

    for cls in CLASSES.values():
        for weighted, return_bias in product((False, True), repeat=2):
            args = arguments(
                moe_num_experts=3, moe_top_k=2, shared_expert=True, shared_expert_weighted_sum=weighted,
                return_bias=return_bias,
            )  # fmt: skip
            layer, x = cls(args), torch.randn(5, 12)
            nn.init.normal_(layer.experts.bias)
            want = added(layer(x))
            for name in ("router", "experts", "shared_expert"):
                setattr(layer, name, Wrapper(getattr(layer, name)))
            assert torch.equal(added(layer(x)), want)
            experts = layer.experts.module
            experts.mlp.hidden_size = 8  # as llm-foundry sets it; the layer must not read it
            experts.mlp.w1 = nn.Parameter(torch.zeros_like(experts.mlp.w1))
            layer.shared_expert = None
            assert torch.equal(added(layer(x)), experts.bias.expand(5, 12))


def test_methods_of_the_experts() -> None:
    torch.manual_seed(0)
    for mlp_type, act in product(("mlp", "glu"), (F.relu, torch.tanh)):
        args = arguments(
            moe_num_experts=3, moe_top_k=2, ffn_hidden_size=256, activation_fn=act, mlp_type=mlp_type, bias=False
        )  # fmt: skip
        experts, x = dmoe.dMoE(args).experts, torch.randn(9, 12)
        weights, ids = torch.rand(9, 2), torch.tensor([[0, 2]]).expand(9, 2)  # no token for expert 1
        out, counts = experts.forward_once(x, weights, ids)
        assert counts.tolist() == [9, 0, 9]
        indices, bin_ids, bins, counts = experts.indices_and_bins(ids.flatten())
        assert (indices.dtype, bin_ids.dtype, bins.dtype, counts.dtype) == (torch.int32,) * 4
        assert indices.tolist() == [*range(0, 18, 2), *range(1, 18, 2)]
        assert (bin_ids.tolist(), bins.tolist()) == ([0] * 9 + [2] * 9, [9, 9, 18])
        sorted_args = (x, counts, indices, bin_ids, weights.flatten(), bins, -1, 2)
        for method in (experts.permute_and_compute, experts.sparse_permute_and_compute):
            torch.testing.assert_close(method(*sorted_args), out)
        # By hand, over rows grouped by expert, padded to blocks or not.
        rows = megablocks.ops.gather(x, indices, bin_ids, bins, 2)
        y = experts.mlp(rows, counts)
        torch.testing.assert_close(megablocks.ops.scatter(y, indices, bin_ids, weights.flatten(), bins, 2), out)
        indices, bin_ids, bins, padded_bins, _ = experts.indices_and_padded_bins(ids.flatten())
        assert padded_bins.tolist() == [128, 128, 256]
        padded = megablocks.ops.padded_gather(x, indices, bin_ids, bins, padded_bins, 2)
        topology = experts.topology(padded, padded_bins)
        assert topology.size() == (256, 768)
        assert topology.column_indices.tolist() == [0, 1, 4, 5]
        assert (topology.offsets.tolist(), topology.row_indices.tolist()) == ([0, 2, 4], [0, 0, 1, 1])
        assert (topology.offsets_t.tolist(), topology.column_indices_t.tolist()) == (
            [0, 1, 2, 2, 2, 3, 4],
            [0, 0, 1, 1],
        )
        y = experts.mlp(padded, topology)
        args_of_scatter = (indices, bin_ids, weights.flatten(), bins, padded_bins, 2)
        torch.testing.assert_close(megablocks.ops.padded_scatter(y, *args_of_scatter), out)
        views = [p.view(3, -1, 12) for p in experts.mlp.parameters()]
        sizes = torch.tensor([9, 0, 9])
        if mlp_type == "mlp":
            torch.testing.assert_close(
                mlp.memory_optimized_grouped_mlp(rows, *views, sizes, act), experts.mlp(rows, sizes)
            )
            flat = [p.view(-1, 12) for p in views]
            torch.testing.assert_close(mlp.memory_optimized_mlp(padded, *flat, topology, act), y)
        else:
            w1, w2, v1 = views
            grouped = glu.memory_optimized_grouped_glu(rows, w1, v1, w2, sizes, act)
            torch.testing.assert_close(grouped, experts.mlp(rows, sizes))
        with pytest.raises(ConfigError, match="tokens_per_expert is None"):
            experts.mlp(rows)


def test_methods_of_the_experts_with_a_capacity() -> None:
    args = arguments(moe_num_experts=4, moe_top_k=2, moe_capacity_factor=1.25, activation_fn=F.relu)
    experts, x = moe.MoE(args).experts, torch.randn(6, 12)
    assert experts.expert_capacity(6) == 3
    assert experts.expert_capacity(0) == 0
    weights, ids = torch.rand(6, 2), torch.tensor([[0, 3]] * 5 + [[1, 0]])
    out, _ = experts.forward_once(x, weights, ids)
    indices, bin_ids, bins, counts = experts.indices_and_bins(ids.flatten())
    binned = megablocks.ops.binned_gather(x, indices, bins, 3, 2)
    y = experts.mlp(binned)
    assert y.shape == binned.shape == (4, 3, 12)
    torch.testing.assert_close(megablocks.ops.binned_scatter(y, indices, weights.flatten(), bins, 2), out)
    again = experts.permute_and_compute(x, counts, indices, bin_ids, weights.flatten(), bins, 3, 2)
    assert torch.equal(again, out)
    scores = torch.rand(6, 4)
    want = 4 / 12 * (counts.float() * scores.mean(0)).sum()
    torch.testing.assert_close(experts.load_balancing_loss(counts, scores), want)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("grouped", [False, True])
def test_experts_choose_tokens(cls: str, grouped: bool) -> None:
    torch.manual_seed(0)
    for top_k, act in (2, F.silu), (3, F.silu), (1, torch.tanh):
        args = arguments(
            moe_num_experts=3, moe_top_k=top_k, moe_expert_choice=not grouped, moe_expert_choice_grouped=grouped,
            activation_fn=act, init_method=nn.init.normal_, return_bias=False,
        )  # fmt: skip
        layer, x = CLASSES[cls](args).double(), torch.randn(2, 5, 12, dtype=torch.float64)
        weights = oracle.parameters_of(layer)
        w1, _, w2 = oracle.expert_weights(weights, cls == "dMoE", 3)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        scores = (theirs @ weights["router.layer.weight"].t()).softmax(dim=-1)
        rows = []
        groups = [[(b, t) for t in range(5)] for b in range(2)]
        groups = [groups[0] + groups[1]] if grouped else groups
        taken = [0] * 3
        for group, e in product(groups, range(3)):
            best = sorted(group, key=lambda place: -float(scores[place][e].detach()))[: top_k * len(group) // 3]
            taken[e] += len(best)
            for b, t in best:
                y = scores[b, t, e] * (act(w1[e] @ theirs[b, t]) @ w2[e])
                rows.append(F.pad(y.view(1, 1, -1), (0, 0, t, 4 - t, b, 1 - b)))
        want = torch.stack(rows).sum(0) + weights["experts.bias"]
        got = layer(ours)
        torch.testing.assert_close(got, want)
        assert moe.get_load_balancing_loss()[-1][0].tolist() == taken
        got_grads = backward(got.square().sum(), {"x": ours, **dict(layer.named_parameters())})
        want_grads = backward(want.square().sum(), {"x": theirs, **weights})
        for name in want_grads:
            torch.testing.assert_close(got_grads[name], want_grads[name])
    assert layer(torch.zeros(2, 0, 12, dtype=torch.float64)).shape == (2, 0, 12)
    with pytest.raises(ConfigError, match="number of tokens is"):
        layer(torch.zeros(1, 2, 12, dtype=torch.float64))
    if not grouped:
        with pytest.raises(ConfigError, match=r"shape of x is \(4, 12\): must be \[sequences"):
            layer(torch.zeros(4, 12, dtype=torch.float64))


def test_wrong_input() -> None:
    layer = dmoe.dMoE(arguments(moe_num_experts=2))
    for shape in ((3, 11), (12,)):
        with pytest.raises(ConfigError, match="shape of x is"):
            layer(torch.zeros(shape))
    with pytest.raises(ConfigError, match=r"gate_up_proj is torch\.float32"):
        layer.experts(torch.zeros(3, 12).half(), torch.rand(3, 2), torch.rand(3, 1), torch.zeros(3, 1).long())
