"""Layers of the fork that trains with MegaBlocks: files put together by hand, and what its layers compute."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.checkpoint.formats import megatron
from dmoe.checkpoint.formats.megatron import fork
from dmoe.errors import ConfigError, RunError
from dmoe.moe import MoE

D, WIDTH, E, LAYERS = 12, 8, 4, 4


def checkpoint(folder: Path, *, glu: bool = False, capacity: int = 0, dp: int = 1, pp: int = 1) -> list[dict[str, Any]]:
    """A checkpoint of the fork, an expert and a rank at a time; returns the layers' whole weights [E, F, D]."""
    generator = torch.Generator().manual_seed(dp + 10 * pp)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    names = ("w1", "v1", "w2") if glu else ("w1", "w2")
    layers = [
        {"router": random(E, D), "bias": random(D), **{name: random(E, WIDTH, D) for name in names}}
        for _ in range(LAYERS)
    ]
    args = argparse.Namespace(
        hidden_size=D, ffn_hidden_size=WIDTH, num_layers=LAYERS, moe_num_experts=E, moe_top_k=2, moe_loss_weight=0.1,
        moe_capacity_factor=capacity, glu=glu, moe_expert_model_parallelism=dp > 1, pipeline_model_parallel_size=pp,
        moe_use_megatron_switch=False, tensor_model_parallel_size=1,
    )  # fmt: skip
    degree = min(dp, E)
    for rank in range(dp):
        for stage in range(pp):
            encoder: dict[str, Tensor] = {"final_layernorm.weight": random(D)}
            for n in range(LAYERS // pp):
                layer, prefix = layers[stage * LAYERS // pp + n], f"layers.{n}.mlp.moe."
                encoder[f"{prefix}router.layer.weight"] = layer["router"]
                encoder[f"{prefix}experts.bias"] = layer["bias"]
                for name in names:
                    mine = []
                    for e in range(E):
                        if e // (E // degree) == rank % degree:
                            rows = layer[name][e].chunk(dp // degree)[rank // degree]
                            mine.append(rows.T if capacity and name == "w1" else rows)
                    stacked = torch.stack(mine) if capacity else torch.cat(mine)
                    encoder[f"{prefix}experts.mlp.{name}"] = stacked
            name = "mp_rank_00" + (f"_{rank:03d}" if dp > 1 else "") + (f"_{stage:03d}" if pp > 1 else "")
            file = folder / "iter_0000005" / name / ("model_rng.pt" if dp > 1 else "model_optim_rng.pt")
            file.parent.mkdir(parents=True)
            model = {"language_model": {"encoder": encoder, "embedding": {}}}
            torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 5, "model": model}, file)
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    return layers


@pytest.mark.parametrize(
    ("options"),
    [{}, {"glu": True}, {"capacity": 1}, {"dp": 2, "pp": 2}, {"dp": 8, "glu": True}, {"dp": 4, "capacity": 1}],
)
def test_layers_both_ways(options: dict[str, Any], tmp_path: Path):
    layers = checkpoint(tmp_path, **options)
    source = fork.ForkLayers(tmp_path)
    config = source.config
    assert source.layers == list(range(LAYERS))
    assert (config.gated, config.capacity_factor) == (options.get("glu", False), options.get("capacity", 0))
    assert config.aux_loss_coef == 0.1 / LAYERS
    dp = options.get("dp", 1)
    for number, layer in enumerate(layers):
        state = source.read(number)
        model = MoE(config)
        model.load_state_dict(state)  # every name and shape
        bias = source.output_bias(number)
        assert bias is not None
        assert torch.equal(bias, layer["bias"])
        up = state["experts.gate_up_proj" if config.gated else "experts.up_proj"]
        for e in range(E):
            assert torch.equal(up[e, :WIDTH], layer["w1"][e])
            assert torch.equal(state["experts.down_proj"][e], layer["w2"][e].T)
            if config.gated:
                assert torch.equal(up[e, WIDTH:], layer["v1"][e])
        for rank in range(dp):
            stored = fork.rank_state(state, config, rank, dp, bias)
            pp = options.get("pp", 1)
            stage, local = divmod(number, LAYERS // pp)
            encoder = source._states[rank, stage]
            prefix = f"layers.{local}.mlp.moe."
            wanted = {k.removeprefix(prefix): v for k, v in encoder.items() if k.startswith(prefix)}
            assert stored.keys() == wanted.keys()
            assert all(torch.equal(stored[key], value) for key, value in wanted.items())


def test_the_layer_computes_what_the_fork_does(tmp_path: Path):
    (layer, *_) = checkpoint(tmp_path, glu=True)
    source = fork.ForkLayers(tmp_path)
    model = MoE(source.config).eval()
    model.load_state_dict(source.read(0))
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(0))
    scores = (x @ layer["router"].T).softmax(-1)
    wanted = torch.zeros(9, D)
    for t in range(9):
        for e in scores[t].topk(2).indices.tolist():
            hidden = F.gelu(x[t] @ layer["w1"][e].T, approximate="tanh") * (x[t] @ layer["v1"][e].T)
            wanted[t] += scores[t, e] * (hidden @ layer["w2"][e])
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-4)


def test_what_is_refused(tmp_path: Path):
    checkpoint(tmp_path / "x", dp=2)
    (tmp_path / "y").mkdir()
    checkpoint(tmp_path / "y")
    with pytest.raises(ConfigError, match="learned positions, LayerNorm and biases"):
        megatron.open(tmp_path / "y")
    source = fork.ForkLayers(tmp_path / "y")
    config, state = source.config, source.read(0)
    for change, message in (
        ({"norm_topk_prob": True}, "moe.norm_topk_prob is True: must be False in the fork"),
        ({"activation": "silu"}, "moe.activation is 'silu'"),
        ({"capacity_factor": 1.0, "gated": True}, "moe.gated is True"),
    ):
        with pytest.raises(ConfigError, match=message):
            fork.rank_state(state, dataclasses.replace(config, **change))
    with pytest.raises(ConfigError, match="data parallel ranks is 3"):
        fork.rank_state(state, config, 0, 3)
    file = tmp_path / "x" / "iter_0000005" / "mp_rank_00_001" / "model_rng.pt"
    file.unlink()
    with pytest.raises(RunError, match=r"mp_rank_00_001: has none of model_optim_rng\.pt, model_rng\.pt"):
        fork.ForkLayers(tmp_path / "x")
