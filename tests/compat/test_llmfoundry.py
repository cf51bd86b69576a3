"""llm-foundry's blocks: configuration, marks, initial weights; steps on 2 and 4 gloo ranks (llmfoundry_worker.py)."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn

from dmoe.compat.megablocks.layers.arguments import DEFAULT_ACTIVATION_FN
from dmoe.compat.megablocks.layers.dmoe import dMoE
from dmoe.compat.megablocks.layers.moe import MoE
from dmoe.errors import ConfigError
from dmoe.integrations.llmfoundry import (
    build_mb_ffn,
    build_moe_mesh,
    init_fused_or_stacked,
    init_mb_ffn,
    mb_arguments,
    quick_gelu,
)

sys.path.insert(0, str(Path(__file__).parent))
import llmfoundry_worker

D, F_, E = 8, 12, 5


@pytest.mark.parametrize("world", [2, 4])
def test_steps_and_initial_weights_over_a_mesh(world: int, tmp_path: Path) -> None:
    run_ranks(llmfoundry_worker.rank_main, (world, str(tmp_path / "store")), world)


def block(kind: str = "mb_dmoe", **config: Any) -> Any:
    config = {"moe_num_experts": E, "moe_top_k": 2, "moe_capacity_factor": 0} | config
    return build_mb_ffn(kind, D, ffn_hidden_size=F_, ffn_config=config, device="cpu")


@pytest.mark.parametrize(("kind", "mlp_type"), llmfoundry_worker.KINDS)
@pytest.mark.parametrize("shape", [(7, D), (2, 3, D), (1, D), (0, D)], ids=str)
def test_one_process_against_the_loop(kind: str, mlp_type: str, shape: tuple[int, ...]) -> None:
    weights = {"moe_num_experts": E, "moe_top_k": 2, "mlp_type": mlp_type, "moe_normalize_expert_weights": 1}
    config = weights | {"moe_capacity_factor": 0, "moe_loss_weight": 0}
    ffn: Any = build_mb_ffn(kind, D, ffn_hidden_size=F_, ffn_config=config, ffn_act_fn=F.silu, device="cpu")
    init_mb_ffn(ffn, nn.init.xavier_normal_)
    loop = llmfoundry_worker.LoopBlock(llmfoundry_worker.whole(ffn.named_parameters()), 2, E)
    x = torch.randn(shape)
    torch.testing.assert_close(ffn(x), loop(x)[0], rtol=1e-5, atol=1e-6)


# ---- configuration


def test_marks() -> None:
    dropless, capacity = block("mb_dmoe"), block("mb_moe")
    assert type(dropless) is dMoE
    assert type(capacity) is MoE
    assert dropless.experts.mlp._fused == (0, [F_, 2 * F_, 3 * F_, 4 * F_])
    assert capacity.experts.mlp._stack_dim == 0
    for ffn in (dropless, capacity):
        assert ffn.experts.mlp.hidden_size == F_
        assert ffn.experts.mlp.expert_parallel_group is None
        assert not hasattr(ffn.experts, "_fsdp_kwargs_dict")
        assert ffn.experts.args.hidden_size == D
        assert isinstance(ffn(torch.randn(2, 3, D)), Tensor)


def test_defaults_that_llmfoundry_sets() -> None:
    args = mb_arguments(D, expansion_ratio=1.5, ffn_config={"ffn_type": "mb_dmoe", "fc_type": "torch"}, device="meta")
    assert (args.hidden_size, args.ffn_hidden_size) == (D, 12)
    assert (args.fp16, args.bf16, args.return_bias, args.bias) == (False, False, False, True)
    assert args.device == "meta"
    assert args.activation_fn is DEFAULT_ACTIVATION_FN
    assert not args.moe_expert_model_parallelism


def test_width_of_an_expert() -> None:
    assert mb_arguments(D).ffn_hidden_size == 4 * D
    assert mb_arguments(D, ffn_config={"ffn_hidden_size": 20}).ffn_hidden_size == 20
    assert mb_arguments(D, ffn_hidden_size=24, ffn_config={"ffn_hidden_size": 20}).ffn_hidden_size == 24


@pytest.mark.parametrize(
    ("given", "formula"),
    [
        ({"name": "silu"}, lambda x: x / (1 + (-x).exp())),
        ({"name": "gelu"}, lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        (
            {"name": "gelu", "approximate": "tanh"},
            lambda x: x * 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()),
        ),
        ({"name": "leaky_relu", "negative_slope": 0.3}, lambda x: x.clamp(min=0) + 0.3 * x.clamp(max=0)),
        ({"name": "quick_gelu"}, lambda x: x / (1 + (-1.702 * x).exp())),
        (torch.tanh, torch.tanh),
    ],
    ids=["silu", "gelu", "tanh gelu", "leaky relu", "quick gelu", "callable"],
)
def test_activations(given: Any, formula: Any) -> None:
    """Through the layer: one expert, whose weight is 1 after the softmax."""
    config = {"moe_num_experts": 1, "moe_top_k": 1}
    for where in ({"ffn_act_fn": given}, {"ffn_config": config | {"ffn_act_fn": given}}):
        ffn: Any = build_mb_ffn("mb_dmoe", D, **{"ffn_hidden_size": F_, "ffn_config": config, "device": "cpu"} | where)
        init_mb_ffn(ffn, nn.init.xavier_normal_)
        w1, w2 = (getattr(ffn.experts.mlp, name).detach().double() for name in ("w1", "w2"))
        x = torch.randn(6, D)
        torch.testing.assert_close(ffn(x).double(), formula(x.double() @ w1.t()) @ w2, rtol=1e-5, atol=1e-6)
    assert quick_gelu(torch.zeros(1)) == 0


def test_config_is_not_changed() -> None:
    config = {"moe_num_experts": E, "moe_world_size": 1, "ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}
    before = repr(config)
    build_mb_ffn("mb_moe", D, ffn_config=config)
    assert repr(config) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"ffn_config": {"moe_num_expert": 4}}, "ffn_config.moe_num_expert .* nearest is 'moe_num_experts'"),
        ({"ffn_config": {"moe_topk": 4}}, "ffn_config.moe_topk .* nearest is 'moe_top_k'"),
        ({"ffn_config": {"moe_world": 4}}, "nearest is 'moe_world_size'"),
        ({"ffn_config": {"hidden_size": 8}}, "ffn_config.hidden_size is set: must be left out"),
        ({"ffn_config": {"moe_world_size": 2}}, r"moe_world_size is 2: must be 1 without .* build_moe_mesh\(2\)"),
        ({"ffn_config": {"device_mesh": [2, 4]}}, r"ffn_config.device_mesh is \[2, 4\]: must be one number"),
        ({"ffn_config": {"return_bias": True}}, "ffn_config.return_bias is True: must be False"),
        ({"ffn_config": {"mlp_type": "gated"}}, "mlp_type"),
        ({"ffn_act_fn": {"name": "sillu"}}, "ffn_act_fn.name is 'sillu'"),
        ({"ffn_act_fn": {}}, "ffn_act_fn.name is None"),
        ({"expansion_ratio": 1.3}, "expansion_ratio is 1.3: must be such that"),
        ({"ffn_type": "mptmlp"}, "ffn_type is 'mptmlp': must be one of mb_moe, mb_dmoe"),
    ],
    ids=str,
)
def test_errors(call: dict[str, Any], message: str) -> None:
    call = {"ffn_type": "mb_dmoe", "d_model": D} | call
    with pytest.raises(ConfigError, match=message):
        build_mb_ffn(**call)


def test_loss_group_has_no_effect() -> None:
    with pytest.warns(UserWarning, match="lbl_process_group has no effect"):
        mb_arguments(D, ffn_config={"lbl_process_group": "global_group"})


def test_mesh_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be initialised"):
        build_moe_mesh(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        with pytest.raises(ConfigError, match=r"moe_world_size is 2: must be a divisor of the number of ranks \(1\)"):
            build_moe_mesh(2)
        mesh = build_moe_mesh(1)
        with pytest.raises(ConfigError, match="moe_world_size is 2: must be the size of the mesh"):
            mb_arguments(D, ffn_config={"moe_world_size": 2}, device_mesh=mesh)
        with pytest.raises(ConfigError, match=r"ffn_config.device_mesh is \[8\]: must be \[1\]"):
            mb_arguments(D, ffn_config={"device_mesh": [8]}, device_mesh=mesh)
        with pytest.raises(ConfigError, match="axes of device_mesh"):
            mb_arguments(D, device_mesh=mesh["expert_parallel"])
        assert mb_arguments(D, device_mesh=mesh).expert_parallel_group is None
    finally:
        dist.destroy_process_group()


# ---- initial weights


def test_values_are_those_of_whole_parameters_drawn_in_order() -> None:
    """llm-foundry makes the whole parameter and fills its blocks one after another: w1, w2, then v1."""
    ffn = block(mlp_type="glu")
    torch.manual_seed(3)
    init_fused_or_stacked(ffn.experts.mlp, nn.init.normal_, div_is_residual=2.0)
    torch.manual_seed(3)
    for name, divisor in (("w1", 1), ("w2", 2), ("v1", 1)):
        expected = torch.empty(E * F_, D)
        for e in range(E):
            nn.init.normal_(expected[e * F_ : (e + 1) * F_])
        assert torch.equal(getattr(ffn.experts.mlp, name).detach(), expected / divisor)
    ffn = block("mb_moe")
    torch.manual_seed(3)
    init_fused_or_stacked(ffn.experts.mlp, nn.init.normal_, div_is_residual=2.0)
    torch.manual_seed(3)
    for name, divisor, shape in (("w1", 1, (E, D, F_)), ("w2", 2, (E, F_, D))):
        expected = torch.empty(shape)
        for e in range(E):
            nn.init.normal_(expected[e])
        assert torch.equal(getattr(ffn.experts.mlp, name).detach(), expected / divisor)


@pytest.mark.parametrize("kind", ["mb_dmoe", "mb_moe"])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_each_expert_has_its_own_fan(kind: str, mode: str) -> None:
    """Kaiming with a = 0 and gain sqrt(2): std sqrt(2 / fan). Up: D in, F out; down: F in, D out."""
    d, f, num_experts = 64, 256, 3
    config = {"moe_num_experts": num_experts, "mlp_type": "glu" if kind == "mb_dmoe" else "mlp"}
    ffn: Any = build_mb_ffn(kind, d, ffn_hidden_size=f, ffn_config=config, device="cpu")
    init_mb_ffn(ffn, partial(nn.init.kaiming_normal_, mode=mode), div_is_residual=4.0)
    for name, parameter in ffn.experts.mlp.named_parameters():
        fans = {"fan_in": f, "fan_out": d} if name == "w2" else {"fan_in": d, "fan_out": f}
        std = math.sqrt(2 / fans[mode]) / (4 if name == "w2" else 1)
        experts = parameter.detach().view(num_experts, -1)
        # The standard deviation of the standard deviation of n draws is std / sqrt(2 n).
        tolerance = 4 * std / math.sqrt(2 * experts.shape[1])
        assert ((experts.std(dim=1) - std).abs() < tolerance).all(), name
        assert (experts.mean(dim=1).abs() < 4 * std / math.sqrt(experts.shape[1])).all(), name


def test_every_parameter_is_initialised_once() -> None:
    ffn = block(mlp_type="glu", shared_expert=True)
    drawn = []
    for parameter in ffn.parameters():
        parameter.data.fill_(float("nan"))
    init_mb_ffn(ffn, lambda matrix: drawn.append(tuple(matrix.shape)) or nn.init.normal_(matrix))
    assert all(parameter.isfinite().all() for parameter in ffn.parameters())
    shared = [(F_, D), (F_, D), (D, F_)]  # gate, up, down
    assert sorted(drawn) == sorted([(E, D), *[(F_, D)] * (3 * E), *shared])
    assert all((parameter == 0).all() for name, parameter in ffn.named_parameters() if name.endswith("bias"))


def test_meta_device() -> None:
    ffn: Any = build_mb_ffn("mb_dmoe", D, ffn_hidden_size=F_, ffn_config={"moe_num_experts": E}, device="meta")
    init_mb_ffn(ffn, nn.init.normal_)
    assert all(parameter.is_meta for parameter in ffn.parameters())
    ffn.to_empty(device="cpu")
    torch.manual_seed(5)
    init_mb_ffn(ffn, nn.init.normal_)
    other: Any = build_mb_ffn("mb_dmoe", D, ffn_hidden_size=F_, ffn_config={"moe_num_experts": E}, device="cpu")
    torch.manual_seed(5)
    init_mb_ffn(other, nn.init.normal_)
    for got, expected in zip(ffn.parameters(), other.parameters()):
        assert torch.equal(got, expected)


def test_init_errors() -> None:
    with pytest.raises(ConfigError, match="mark _fused or _stack_dim is None"):
        init_fused_or_stacked(nn.Linear(2, 2), nn.init.normal_)
