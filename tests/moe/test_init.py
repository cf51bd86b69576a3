"""Initial weights: the streams against their definition, the rules against standard deviations worked by hand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dmoe.config import ModelConfig, MoEConfig
from dmoe.errors import ConfigError
from dmoe.models import Decoder
from dmoe.moe import MoE, init_parameters, streams
from dmoe.moe.sharded import _split

CONFIG = ModelConfig(
    vocab_size=301, hidden_size=48, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=80,
    first_k_dense=1, tie_embeddings=False,
    moe=MoEConfig(intermediate_size=40, num_experts=5, top_k=2, shared_intermediate_size=24, bias=True),
)  # fmt: skip


def seed_of(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little") >> 1


def old_init(module: nn.Module, std: float, output_std: float, seed: int | None) -> None:
    """The algorithm before blocks and rules: one draw a parameter."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            words = name.split(".")
            matrix = words[-2] if words[-1] == "weight" and len(words) > 1 else words[-1]
            if words[-1].endswith("bias"):
                p.zero_()
            elif len(words) > 1 and words[-2].endswith("norm"):
                p.fill_(1.0)
            else:
                generator = None if seed is None else torch.Generator().manual_seed(seed_of(f"{seed}:{name}"))
                p.normal_(std=output_std if matrix in ("down_proj", "o_proj") else std, generator=generator)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return all(name == other and torch.equal(p, q) for (name, p), (other, q) in pairs)


class Holder(nn.Module):
    """One parameter called `w`."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full(shape, math.nan, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("seed", [0, 7, None])
def test_parameters_of_one_block_have_the_values_of_one_draw(seed: int | None, dtype: torch.dtype) -> None:
    ours, theirs = Decoder(CONFIG).to(dtype), Decoder(CONFIG).to(dtype)
    for output_std, arguments in ((0.3, {"output_std": 0.3}), (0.5 / math.sqrt(6), {"depth": "all", "num_layers": 3})):
        torch.manual_seed(3)
        init_parameters(ours, std=0.5, seed=seed, **arguments)  # type: ignore[arg-type]
        torch.manual_seed(3)
        old_init(theirs, 0.5, output_std, seed)
        assert same(ours, theirs)


def test_a_block_has_two_to_the_twenty_elements() -> None:
    """At the real size: equal to one draw up to it, and from there on each block by itself."""
    one, more = Holder(1024, 1024), Holder(3, 350, 1024)
    init_parameters(one, std=1.0, seed=5)
    init_parameters(more, std=1.0, seed=5)
    assert torch.equal(one.w, torch.empty(1024, 1024).normal_(generator=torch.Generator().manual_seed(seed_of("5:w"))))
    assert torch.equal(more.w.flatten(0, 1)[:1024], one.w)
    rest = torch.empty(26, 1024).normal_(generator=torch.Generator().manual_seed(seed_of("5:w:1")))
    assert torch.equal(more.w.flatten(0, 1)[1024:], rest)


def by_definition(shape: tuple[int, ...], block: int, draw: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
    columns = shape[-1] if shape else 1
    num_rows, height = math.prod(shape) // columns, max(1, block // columns)
    blocks = []
    for b in range(-(-num_rows // height)):
        generator = torch.Generator().manual_seed(seed_of("9:w" if b == 0 else f"9:w:{b}"))
        blocks.append(draw(torch.empty(min(height, num_rows - b * height), columns), generator))
    return torch.cat(blocks).view(shape)


@pytest.mark.parametrize("shape", [(6, 10, 7), (41, 3), (2, 3, 4, 5), (5, 200), (130,), (1, 1), ()])
def test_blocks_by_their_definition(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than a block, a last block of few rows, one dim and none."""
    monkeypatch.setattr(streams, "BLOCK_ELEMENTS", 100)
    holder = Holder(*shape)
    init_parameters(holder, std=0.3, seed=9)
    assert torch.equal(holder.w, by_definition(shape, 100, lambda t, g: t.normal_(std=0.3, generator=g)))
    init_parameters(holder, std=0.3, seed=9, rule="trunc_normal")
    bound = math.erf(3 / math.sqrt(2))
    uniform = by_definition(shape, 100, lambda t, g: t.uniform_(-bound, bound, generator=g)).double()
    # That distribution's cumulative probability of the value is the uniform number it was made of.
    probability = torch.special.erf(holder.w.double() / (0.3 * math.sqrt(2)))
    torch.testing.assert_close(probability, uniform, rtol=0, atol=2e-6)


def test_a_transposed_parameter_has_the_values_of_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK_ELEMENTS", 100)
    plain, transposed = Holder(30, 20), Holder(20, 30)
    transposed.w = nn.Parameter(transposed.w.data.t())
    init_parameters(plain, seed=1)
    init_parameters(transposed, seed=1)
    assert torch.equal(plain.w, transposed.w)


def test_what_is_left_alone_and_what_is_not() -> None:
    """Parameters on meta and without elements; frozen ones are drawn like others."""
    module = nn.ParameterDict(
        {"frozen": nn.Parameter(torch.zeros(9, 9), requires_grad=False), "empty": nn.Parameter(torch.empty(4, 0)),
         "meta": nn.Parameter(torch.empty(2, 2, device="meta"))}
    )  # fmt: skip
    for rule in ("normal", "mitchell"):
        init_parameters(module, seed=0, rule=rule)
        assert module["frozen"].count_nonzero() == 81
        module["frozen"].data.zero_()
    assert module["meta"].is_meta


@pytest.mark.parametrize("rule", ["normal", "mitchell"])
def test_values_do_not_depend_on_other_parameters(rule: str) -> None:
    class Model(nn.Module):
        def __init__(self, names: list[str]) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(12, 8))

    both, one = Model(["b", "a", "c"]), Model(["a"])
    init_parameters(both, seed=4, rule=rule)
    init_parameters(one, seed=4, rule=rule)
    assert torch.equal(both.a.weight, one.a.weight)
    assert not torch.equal(both.a.weight, both.b.weight)
    assert not torch.equal(both.a.weight, both.c.weight)
    init_parameters(one, seed=5, rule=rule)
    assert not torch.equal(both.a.weight, one.a.weight)


# Rule, depth, and by name what a matrix of the decoder above must have, with its layer's number i: D = 48, experts 40,
# shared 24, dense 80, heads 32 wide together.
STD = 0.1
WANTED: list[tuple[str, str, Callable[[str, int, int], float]]] = [
    ("normal", "none", lambda role, fan_in, i: STD),
    ("normal", "all", lambda role, fan_in, i: STD / 6**0.5 if role == "out" else STD),
    ("normal", "layer", lambda role, fan_in, i: STD / (2, 4, 6)[i] ** 0.5 if role == "out" else STD),
    ("trunc_normal", "none", lambda role, fan_in, i: STD),
    ("trunc_normal", "layer", lambda role, fan_in, i: STD / (2, 4, 6)[i] ** 0.5 if role == "out" else STD),
    ("mitchell", "all", lambda role, fan_in, i: (fan_in * (2, 4, 6)[i] if role == "out" else fan_in) ** -0.5),
    ("mup", "none", lambda role, fan_in, i: {"embed": STD, "head": STD / 4}.get(role, STD * (12 / fan_in) ** 0.5)),
    (
        "mup", "all",
        lambda role, fan_in, i: {"embed": STD, "head": STD / 4, "out": STD * (2 / fan_in) ** 0.5}.get(
            role, STD * (12 / fan_in) ** 0.5
        ),
    ),
]  # fmt: skip
MATRICES = {
    "embed_tokens.weight": ("embed", 48), "lm_head.weight": ("head", 48),
    "self_attn.q_proj.weight": ("in", 48), "self_attn.k_proj.weight": ("in", 48),
    "self_attn.v_proj.weight": ("in", 48), "self_attn.o_proj.weight": ("out", 32),
    "mlp.gate_proj.weight": ("in", 48), "mlp.up_proj.weight": ("in", 48), "mlp.down_proj.weight": ("out", 80),
    "mlp.router.weight": ("in", 48), "mlp.experts.gate_up_proj": ("in", 48), "mlp.experts.down_proj": ("out", 40),
    "mlp.shared_experts.gate_proj.weight": ("in", 48), "mlp.shared_experts.up_proj.weight": ("in", 48),
    "mlp.shared_experts.down_proj.weight": ("out", 24),
}  # fmt: skip


@pytest.mark.parametrize(("rule", "depth", "wanted"), WANTED)
def test_rules(rule: str, depth: str, wanted: Callable[[str, int, int], float]) -> None:
    model = Decoder(CONFIG)
    init_parameters(model, std=STD, seed=0, rule=rule, depth=depth, num_layers=3, base_width=12)  # type: ignore[arg-type]
    cut = rule in ("trunc_normal", "mitchell")
    # Of the values beyond 3 standard deviations nothing is left: the variance that remains, by integration.
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    kept = math.sqrt(1 - 6 * density / math.erf(3 / math.sqrt(2))) if cut else 1.0
    seen = set()
    for name, p in model.named_parameters():
        layer, _, inside = (
            name.removeprefix("layers.").partition(".") if name.startswith("layers.") else ("0", "", name)
        )
        if inside not in MATRICES:
            assert torch.equal(p, torch.full_like(p, float("norm" in name))), name
            continue
        seen.add(inside)
        std = wanted(*MATRICES[inside], int(layer))
        error = kept * std / math.sqrt(2 * p.numel())
        assert p.std().item() == pytest.approx(kept * std, abs=3 * error), name
        assert abs(p.mean().item()) < 3 * kept * std / math.sqrt(p.numel()), name
        assert p.abs().max().item() <= 3 * std or not cut, name
        # The same stream with another standard deviation is another multiple.
        draw = streams.Normal(1.0, 3.0 if cut else None)
        unit = torch.empty_like(p.detach())
        streams.fill_shard(unit, draw, name=name, seed=0)
        torch.testing.assert_close(p.detach(), unit * std, rtol=1e-5, atol=1e-9)
    assert seen == set(MATRICES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncated_normal_has_its_distribution(dtype: torch.dtype) -> None:
    holder = Holder(500, 400, dtype=dtype)
    for seed in (2, None):
        init_parameters(holder, std=2.0, seed=seed, rule="trunc_normal")
        values = holder.w.detach().double() / 2
        assert values.abs().max() <= 3 * (1 if dtype == torch.float32 else 1 + 2**-8)
        assert values.abs().max() > 2.9
        for x in (-2.53, -1.01, -0.26, 0.27, 1.03, 2.52):
            wanted = 0.5 + 0.5 * math.erf(x / math.sqrt(2)) / math.erf(3 / math.sqrt(2))
            assert (values < x).double().mean().item() == pytest.approx(wanted, abs=0.005)
    assert holder.w.unique().numel() > (400 if dtype == torch.bfloat16 else 150_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_uniform_number_is_not_beyond_the_cut(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded up, as erfinv of the rounded bound is."""
    monkeypatch.setattr(Tensor, "uniform_", lambda t, low, high, generator: t.fill_(high))
    for std in (0.02, 0.3, 2.0):
        block = torch.empty(3, dtype=dtype)
        streams.Normal(std, 3.0).fill(block, None)
        limit = torch.tensor(3 * std, dtype=dtype)
        assert ((0.999 * limit < block) & (block <= limit)).all()


def test_a_layer_alone_counts_as_the_first() -> None:
    layer = MoE(MoEConfig(hidden_size=64, intermediate_size=50, num_experts=8))
    init_parameters(layer, seed=0, rule="mitchell")
    assert layer.experts.down_proj.std().item() == pytest.approx(0.98658 / math.sqrt(100), rel=0.02)
    for name in ("o_proj", "fc2_latent_proj"):
        inside = nn.ModuleDict({name: nn.Linear(64, 400, bias=False)})
        model = nn.ModuleDict({"players": nn.ModuleDict({"9": inside})})
        init_parameters(model, seed=0, std=1.0, depth="layer")
        assert inside[name].weight.std().item() == pytest.approx(1 / math.sqrt(2), rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rule": "xavier"}, "rule is 'xavier': must be one of normal, trunc_normal, mitchell, mup"),
        ({"depth": "half"}, "depth is 'half': must be one of all, layer, none"),
        ({"depth": "all"}, "num_layers is None: must be greater than 0"),
        ({"rule": "mup"}, "base_width is None: must be greater than 0"),
        ({"rule": "mup", "base_width": 0}, "base_width is 0: must be greater than 0"),
        ({"std": -1.0}, "std is -1.0: must be finite"),
        ({"std": math.nan}, "std is nan: must be finite"),
        ({"output_std": math.inf}, "output_std is inf: must be finite"),
        ({"output_std": 0.1, "rule": "mitchell"}, "output_std is 0.1: must be None"),
        ({"output_std": 0.1, "depth": "layer"}, "output_std is 0.1: must be None"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        init_parameters(Holder(2, 2), seed=0, **arguments)  # type: ignore[arg-type]


def test_a_dim_that_several_axes_cut() -> None:
    """FSDP cuts what tensor parallel left, evenly or not; gate and up rows; both: by `torch.chunk` on real indices."""

    def chunk(t: Tensor, count: int, index: int) -> Tensor:
        return (*t.chunk(count), *[t[:0]] * count)[index]

    def indices(runs: list[range]) -> list[int]:
        return [i for run in runs for i in run]

    for size in (*range(1, 15), 67):
        whole = torch.arange(size)
        for fsdp, tp in ((2, 2), (3, 2), (2, 4), (4, 3)):
            for i in range(fsdp):
                for j in range(tp):
                    strided = _split([range(size)], [(fsdp, i, tp), (tp, j, 1)])
                    assert indices(strided) == chunk(chunk(whole, tp, j), fsdp, i).tolist()
                    plain = _split([range(size)], [(fsdp, i, 1), (tp, j, 1)])
                    assert indices(plain) == chunk(chunk(whole, fsdp, i), tp, j).tolist()
                    halves = _split([range(2 * size)], [(fsdp, i, tp), (tp, j, 2)])
                    gate, up = (chunk(half, tp, j) for half in torch.arange(2 * size).chunk(2))
                    assert indices(halves) == chunk(torch.cat([gate, up]), fsdp, i).tolist()
