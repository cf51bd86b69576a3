"""Packed experts: values against the dense fp64 oracle, what is saved, and what they hand over to plain experts."""

import io
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from dense_oracle import ACTIVATIONS, Problem, dense_moe, make_problem, relative_error
from test_expert_mlp_values import SHAPES, TOLERANCE
from torch import nn

from dmoe.errors import ConfigError
from dmoe.moe import Experts, MoE, MoEConfig
from dmoe.moe import packed as moe_packed
from dmoe.moe.packed import PackedExperts, pack_experts, unpack_experts
from dmoe.ops import expert_mlp, packed
from dmoe.ops.packed import PackedWeights, expert_mlp_packed, why_not_packed

REASONS = {dtype: why_not_packed(torch.empty(1, 1, 1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)}
pytestmark = pytest.mark.skipif(REASONS[torch.float32] is not None, reason=str(REASONS[torch.float32]))
DTYPES = [dtype for dtype, reason in REASONS.items() if reason is None]
CONFIG = MoEConfig(hidden_size=16, intermediate_size=24, num_experts=4, top_k=2)


def run_packed(p: Problem) -> torch.Tensor:
    weights = PackedWeights(p.gate_up), PackedWeights(p.down)
    return expert_mlp_packed(
        p.x, p.topk_ids, p.topk_weights, *weights, p.gate_up_bias, p.down_bias, activation=p.activation
    )


def assert_packed_matches(p: Problem) -> None:
    got = run_packed(p)
    assert got.dtype == p.x.dtype
    assert relative_error(got, dense_moe(p)) <= TOLERANCE[p.x.dtype]


@pytest.fixture
def layer(monkeypatch) -> MoE:
    """A layer that is small and packed all the same."""
    monkeypatch.setattr(moe_packed, "_WORTHWHILE", 1)
    torch.manual_seed(0)
    layer = MoE(CONFIG).eval()
    layer.reset_parameters(std=0.5)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values(shape, dtype):
    torch.manual_seed(0)
    assert_packed_matches(make_problem(**shape, bias=True, dtype=dtype))


def test_more_rows_than_one_activation_block(monkeypatch):
    monkeypatch.setattr(packed, "_BLOCK", 1)  # 512 rows then
    torch.manual_seed(0)
    assert_packed_matches(make_problem(T=700, E=3, K=2))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    torch.manual_seed(0)
    gated = [True] if activation == "clamped_swiglu" else [True, False]
    for g in gated:
        assert_packed_matches(make_problem(activation=activation, gated=g, bias=g, h_scale=4.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows(dtype):
    """More rows are computed than there are; those of other experts stay untouched, also behind the last."""
    torch.manual_seed(0)
    p = make_problem(E=2, K=1, T=0, dtype=dtype)
    for rows in range(1, 40):
        ids = torch.tensor([1] * rows + [0] * 3).unsqueeze(1)
        tokens = len(ids)
        assert_packed_matches(
            replace(p, x=torch.randn(tokens, 16).to(dtype), topk_ids=ids, topk_weights=torch.rand(tokens, 1) + 0.1)
        )


def test_numbers_of_rows_computed_are_few():
    sizes = [packed._rows_computed(rows) for rows in range(1, 4097)]
    assert all(rows <= size <= max(rows + 3, 1.125 * rows) for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 66


def test_products_have_only_those_numbers_of_rows(monkeypatch):
    seen, linear = [], packed._linear
    monkeypatch.setattr(packed, "_linear", lambda rows, *rest: seen.append(len(rows)) or linear(rows, *rest))
    for tokens in range(1, 30):
        run_packed(make_problem(T=tokens, E=3, K=2))
    assert {*seen} <= {packed._rows_computed(rows) for rows in range(1, 30)}


def test_nothing_crosses_rows():
    """A NaN token spoils only itself, although its row is computed with other experts' weights as well."""
    torch.manual_seed(0)
    p = make_problem(T=21, E=5, K=2)
    p.x[0] = torch.nan  # the spare rows are copies of token 0
    p.x[7] = torch.nan
    y = run_packed(p)
    assert y[[0, 7]].isnan().all()
    fine = [t for t in range(21) if t not in (0, 7)]
    assert relative_error(y[fine], dense_moe(p)[fine]) <= 1e-5


def test_int32_ids_and_strided_arguments():
    torch.manual_seed(0)
    p = make_problem(bias=True)
    p = replace(p, topk_ids=p.topk_ids.int(), x=p.x.t().contiguous().t(), gate_up=p.gate_up.mT.contiguous().mT)
    assert_packed_matches(p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64, 128), (1, 33, 7), (2, 1, 1)])
def test_unpacking_gives_every_bit_back(shape, dtype):
    plain = torch.randn(shape).to(dtype)
    weights = PackedWeights(plain)
    assert torch.equal(weights.unpack(), plain)
    assert torch.equal(pickle.loads(pickle.dumps(weights)).unpack(), plain)
    if shape[1] % 64 == shape[2] % 64 == 0:
        assert weights.nbytes() == plain.numel() * plain.element_size()


def test_what_cannot_be_packed(monkeypatch):
    for weights, why in ((torch.ones(1, 2, 2).double(), "float64"), (torch.ones(1, 2, 2, device="meta"), "meta")):
        assert why in why_not_packed(weights)
        with pytest.raises(RuntimeError, match=why):
            PackedWeights(weights)
    for broken in (lambda *_: torch.zeros(2, 16), None):
        packed._operators_fail.cache_clear()
        monkeypatch.setattr(packed, "_linear", broken)
        assert why_not_packed(torch.ones(1, 2, 2)) is not None
    packed._operators_fail.cache_clear()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_layer_packs_and_unpacks(layer, gated, bias):
    layer = MoE(replace(CONFIG, gated=gated, bias=bias)).eval()
    layer.reset_parameters(std=0.5)
    x, before = torch.randn(9, 16), {name: t.clone() for name, t in layer.state_dict().items()}
    with torch.no_grad():
        want = layer(x)
        assert pack_experts(layer) == 1
        assert isinstance(layer.experts, PackedExperts)
        assert not [name for name, _ in layer.experts.named_parameters() if name.endswith("_proj")]
        assert relative_error(layer(x), want) < 1e-6
        state = layer.state_dict()
        assert set(state) == set(before)
        assert all(torch.equal(state[name], before[name]) for name in before)
        assert unpack_experts(layer) == 1
        assert type(layer.experts) is Experts
        assert torch.equal(layer(x), want)
    layer.load_state_dict(before)
    assert all(p.requires_grad for p in layer.parameters())


def test_packed_is_what_runs(layer, monkeypatch):
    pack_experts(layer)
    monkeypatch.setattr(moe_packed, "expert_mlp", None)
    with torch.no_grad():
        layer(torch.randn(3, 16))


def test_one_layer_at_a_time_is_in_memory_twice(layer, monkeypatch):
    model = nn.Sequential(*(MoE(CONFIG) for _ in range(3)))
    plain = [weakref.ref(layer.experts) for layer in model]
    alive = []

    def packed_of(experts):
        alive.append(sum(ref() is not None for ref in plain))
        return PackedExperts(experts)

    monkeypatch.setattr(moe_packed, "PackedExperts", packed_of)
    assert pack_experts(model) == 3
    assert alive == [3, 2, 1]


@torch.no_grad()
def test_compiled_layer_runs_packed_outside_the_graph(layer):
    x = torch.randn(2, 5, CONFIG.hidden_size)
    assert pack_experts(layer) == 1
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x), rtol=0, atol=0)


def test_gradients_and_autocast_take_the_plain_way(layer):
    x = torch.randn(9, 16)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    layer(leaves[0]).square().sum().backward()
    router_grad = layer.router.weight.grad.clone()
    layer.zero_grad()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want_half = layer(x)
    pack_experts(layer)
    layer(leaves[1]).square().sum().backward()
    assert relative_error(leaves[1].grad, leaves[0].grad) < 1e-6
    assert relative_error(layer.router.weight.grad, router_grad) < 1e-6
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), want_half)


def test_wrong_arguments_are_the_usual_errors(layer):
    pack_experts(layer)
    ids, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with torch.no_grad():
        for x, at in ((torch.ones(3, 15), "gate_up_proj|down_proj"), (torch.ones(3, 16).bfloat16(), "gate_up_proj")):
            with pytest.raises(ConfigError, match=at):
                layer.experts(x, ids, weights)
        with pytest.raises(ConfigError, match="topk_ids_TK"):
            layer.experts(torch.ones(4, 16), ids, weights)


def test_moving_and_loading_are_errors_and_copies_work(layer):
    state = layer.state_dict()
    pack_experts(layer)
    with pytest.raises(ConfigError, match="pack_experts"):
        layer.load_state_dict(state)
    for move in (layer.experts.bfloat16, lambda: layer.experts.to("meta")):
        with pytest.raises(ConfigError, match="unpack_experts"):
            move()
    layer.float().to("cpu").train().eval()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(again.state_dict()["experts.down_proj"], state["experts.down_proj"])


def test_what_stays_plain(layer):
    small = MoE(CONFIG)
    moe_packed._WORTHWHILE = 2**21  # the fixture puts it back
    assert pack_experts(small) == 0
    moe_packed._WORTHWHILE = 1
    for plain in (
        MoE(replace(CONFIG, backend="reference")), MoE(CONFIG, dtype=torch.float64), MoE(CONFIG, device="meta")
    ):  # fmt: skip
        assert pack_experts(plain) == 0
        assert type(plain.experts) is Experts
    nested = nn.ModuleList([layer, nn.Sequential(MoE(CONFIG))])
    assert pack_experts(nested) == 2
    assert pack_experts(nested) == 0


def test_no_operators_leaves_the_model_as_it_is(layer, monkeypatch):
    monkeypatch.setattr(packed, "_pack", lambda weight: torch.ops.mkldnn.there_is_no_such_operator(weight))
    packed._operators_fail.cache_clear()
    assert pack_experts(layer) == 0
    packed._operators_fail.cache_clear()
    with torch.no_grad():
        layer(torch.randn(3, 16))


def test_backend_of_torch_agrees():
    torch.manual_seed(0)
    p = make_problem(T=100, D=64, F=64, E=8, K=3, bias=True)
    assert relative_error(run_packed(p), expert_mlp(*p.tensors(), backend="torch")) < 1e-5
