"""MegaBlocks' checkpoints against its layers' contract, our façade of them and, for OLMoE, transformers."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmoe.checkpoint.formats import megablocks
from dmoe.config import ModelConfig, MoEConfig
from dmoe.errors import ConfigError, RunError
from dmoe.moe import MoE

sys.path.insert(0, str(Path(__file__).parent))
from formats_megatron_cases import BASE, MOE, QWEN2, MemorySource, assert_same

GLU = ModelConfig(**BASE | {"num_layers": 3}, moe_layer_pattern=(1, 0, 1), moe=MoEConfig(**MOE))
PLAIN = ModelConfig(**BASE, moe=MoEConfig(**MOE | {"gated": False, "activation": "gelu_tanh"}))
SQUARE = dataclasses.replace(PLAIN, moe=dataclasses.replace(PLAIN.moe, intermediate_size=32))
SHARED = ModelConfig(
    **BASE | {"tie_embeddings": True},
    moe=MoEConfig(**MOE | QWEN2 | {"shared_expert_gate": False}),
)
OLMOE = ModelConfig(
    **BASE | {"qk_norm": "full", "intermediate_size": 20}, clip_qkv=3.0,
    moe=MoEConfig(**MOE | {"norm_topk_prob": False, "aux_loss_coef": 0.005, "z_loss_coef": 0.0005}),
)  # fmt: skip


def stored_by_hand(source: MemorySource, layer: str) -> dict[str, Tensor]:
    """A layer's tensors by loops over experts, from the contract of MegaBlocks' state dicts."""
    result: dict[str, Tensor] = {}
    moe = source.config.moe
    for i in source.config.moe_layers():
        theirs, ours = f"model.layers.{i}.mlp.", f"layers.{i}.mlp."
        result[f"{theirs}router.layer.weight"] = source.state[f"{ours}router.weight"]
        w1, v1, w2 = [], [], []
        for e in range(moe.num_experts):
            up = source.state[f"{ours}experts.{'gate_up' if moe.gated else 'up'}_proj"][e]
            down = source.state[f"{ours}experts.down_proj"][e]
            first, second = (up[: len(up) // 2], up[len(up) // 2 :]) if moe.gated else (up, None)
            w1.append(first if layer == "dMoE" else first.T)
            v1.append(second)
            w2.append(down.T)
        join: Any = torch.cat if layer == "dMoE" else torch.stack
        result[f"{theirs}experts.mlp.w1"], result[f"{theirs}experts.mlp.w2"] = join(w1), join(w2)
        if moe.gated:
            result[f"{theirs}experts.mlp.v1"] = join(v1)
        if moe.shared_intermediate_size:
            for name in ("gate_proj", "up_proj", "down_proj"):
                result[f"{theirs}shared_expert.{name}.weight"] = source.state[f"{ours}shared_experts.{name}.weight"]
    mixtures = tuple(f"layers.{i}.mlp." for i in source.config.moe_layers())
    others = {name: tensor for name, tensor in source.state.items() if not name.startswith(mixtures)}
    return result | {n if n.startswith("lm_head") else f"model.{n}": tensor for n, tensor in others.items()}


@pytest.mark.parametrize(
    ("config", "layer"),
    [(GLU, "dMoE"), (PLAIN, "dMoE"), (PLAIN, "MoE"), (SHARED, "dMoE"), (SQUARE, "dMoE"), (SQUARE, "MoE")],
    ids=["glu", "plain", "capacity", "shared", "as wide as the model", "capacity, as wide"],
)  # fmt: skip
def test_both_ways(config: ModelConfig, layer: str, tmp_path: Path):
    source = MemorySource(config, dtype=torch.bfloat16)
    megablocks.write(source, tmp_path / "out", layer=layer)
    written = load_file(tmp_path / "out" / "model.safetensors")
    wanted = stored_by_hand(source, layer)
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(written[name], tensor), name  # shapes too
    assert megablocks.is_one(tmp_path / "out")
    back = megablocks.open(tmp_path / "out")
    assert back.config == config
    assert_same(back, source)
    # As pickles, nested or not, and with an output bias of 0.
    for nested in (False, True):
        folder = tmp_path / f"pickled {nested}"
        folder.mkdir()
        state = wanted | {"model.layers.0.mlp.experts.bias": torch.zeros(32)}
        torch.save({"model": state} if nested else state, folder / "model.pt")
        (folder / "config.json").write_text((tmp_path / "out" / "config.json").read_text())
        assert megablocks.is_one(folder)
        assert_same(megablocks.open(folder), source)


def test_config_of_a_hugging_face_family(tmp_path: Path):
    from dmoe.checkpoint.formats import open_source
    from dmoe.checkpoint.formats.families import mixtral

    source = MemorySource(ModelConfig(**BASE, moe=MoEConfig(**MOE)))
    megablocks.write(source, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(mixtral.from_config(source.config)))
    assert_same(open_source(tmp_path / "out"), source)


def test_shards_and_dtype(tmp_path: Path):
    source = MemorySource(GLU)
    megablocks.write(source, tmp_path / "out", shard_size=20_000, dtype=torch.float16)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert megablocks.is_one(tmp_path / "out")
    back = megablocks.open(tmp_path / "out")
    for name, tensor in source.state.items():
        assert torch.equal(back.read(name), tensor.half())


def test_the_layers_compute_the_same(tmp_path: Path):
    """What a dMoE of the façade computes from the written tensors is what our layer computes from ours."""
    from dmoe.compat.megablocks.layers.arguments import Arguments
    from dmoe.compat.megablocks.layers.dmoe import dMoE
    from dmoe.compat.megablocks.layers.moe import MoE as CapacityMoE

    for config, layer in ((SHARED, "dMoE"), (PLAIN, "MoE")):
        source, moe = MemorySource(config), config.moe
        megablocks.write(source, tmp_path / layer, layer=layer)
        state = load_file(tmp_path / layer / "model.safetensors")
        args = Arguments(
            hidden_size=32, ffn_hidden_size=20, moe_num_experts=6, moe_top_k=2, bias=False, return_bias=False,
            mlp_type="glu" if moe.gated else "mlp", fp16=False, bf16=False, device=torch.device("cpu"),
            activation_fn=F.silu if moe.gated else (lambda x: F.gelu(x, approximate="tanh")),
            moe_normalize_expert_weights=1 if moe.norm_topk_prob else None, moe_capacity_factor=0,
            shared_expert=bool(moe.shared_intermediate_size), shared_expert_hidden_size=28,
        )  # fmt: skip
        theirs = (dMoE if layer == "dMoE" else CapacityMoE)(args).eval()
        prefix = "model.layers.1.mlp."
        theirs.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        ours = MoE(config.layer_moe_config()).eval()
        prefix = "layers.1.mlp."
        ours.load_state_dict({k.removeprefix(prefix): v for k, v in source.state.items() if k.startswith(prefix)})
        x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-4)


def olmo_state(source: MemorySource) -> dict[str, Tensor]:
    """OLMoE's names by hand."""
    ours, result = source.state, {}
    for i in range(source.config.num_layers):
        theirs, layer = f"transformer.blocks.{i}.", f"layers.{i}."
        qkv = [ours[f"{layer}self_attn.{n}_proj.weight"] for n in "qkv"]
        result[f"{theirs}att_proj.weight"] = torch.cat(qkv)
        for name, our_name in (
            ("attn_norm", "input_layernorm"), ("ff_norm", "post_attention_layernorm"), ("attn_out", "self_attn.o_proj"),
            ("q_norm", "self_attn.q_norm"), ("k_norm", "self_attn.k_norm"), ("ffn.router.layer", "mlp.router"),
        ):  # fmt: skip
            result[f"{theirs}{name}.weight"] = ours[f"{layer}{our_name}.weight"]
        gate_up, down = ours[f"{layer}mlp.experts.gate_up_proj"], ours[f"{layer}mlp.experts.down_proj"]
        result[f"{theirs}ffn.experts.mlp.w1"] = torch.cat([w[:20] for w in gate_up])
        result[f"{theirs}ffn.experts.mlp.v1"] = torch.cat([w[20:] for w in gate_up])
        result[f"{theirs}ffn.experts.mlp.w2"] = torch.cat([w.T for w in down])
    for name, our_name in (("wte", "embed_tokens"), ("ln_f", "norm"), ("ff_out", "lm_head")):
        result[f"transformer.{name}.weight"] = ours[f"{our_name}.weight"]
    return result


OLMO_OPTIONS = {
    # as in OLMoE's published configuration, with this test's sizes
    "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 40, "weight_tying": False,
    "alibi": False, "rope": True, "flash_attention": True, "attention_dropout": 0.0, "attention_layer_norm": True,
    "attention_layer_norm_with_affine": True, "include_bias": False, "block_type": "moe", "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "bias_for_layer_norm": False, "activation_type": "swiglu", "clip_qkv": 3.0,
    "max_sequence_length": 64, "vocab_size": 48, "embedding_size": 50, "init_std": 0.02, "moe_top_k": 2,
    "moe_num_experts": 6, "moe_dropless": True, "moe_mlp_impl": "sparse", "moe_zloss_weight": 0.002,
    "moe_loss_weight": 0.01, "norm_after": False,
}  # fmt: skip


def test_olmo_both_ways(tmp_path: Path):
    source = MemorySource(OLMOE)
    (tmp_path / "in").mkdir()
    save_file({k: v.contiguous() for k, v in olmo_state(source).items()}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.yaml").write_text(yaml.safe_dump({"run_name": "x", "model": OLMO_OPTIONS}))
    assert megablocks.is_one(tmp_path / "in")
    back = megablocks.open(tmp_path / "in")
    assert back.config == OLMOE
    assert_same(back, source)
    megablocks.write(back, tmp_path / "out", names="olmo")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == olmo_state(source).keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in olmo_state(source).items())
    again = megablocks.open(tmp_path / "out")
    assert dataclasses.replace(again.config, moe=OLMOE.moe) == OLMOE
    assert again.config.moe.aux_loss_coef == pytest.approx(OLMOE.moe.aux_loss_coef)
    assert_same(again, source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_after": True}, "norm_after is True"),
        ({"layer_norm_type": "default"}, "layer_norm_type is 'default': must be 'rms'"),
        ({"moe_dropless": False}, "moe_dropless is False"),
        ({"activation_type": "gelu"}, "activation_type is 'gelu'"),
        ({"moe_shared_expert": True}, "moe_shared_expert is True"),
        ({"n_layers": None}, "n_layers is missing"),
    ],
)
def test_olmo_that_is_not_ours(changes: dict[str, Any], message: str):
    from dmoe.checkpoint.formats import megablocks_olmo

    with pytest.raises(ConfigError, match=message):
        megablocks_olmo.to_config(OLMO_OPTIONS | changes)


@pytest.mark.parametrize(
    ("moe", "options", "message"),
    [
        ({"score_function": "sigmoid"}, {}, "moe.score_function is 'sigmoid': must be 'softmax' for MegaBlocks"),
        ({"routed_scaling_factor": 2.5}, {}, "routed_scaling_factor"),
        ({"bias": True}, {}, "moe.bias is True"),
        ({"n_group": 2, "topk_group": 1}, {}, "n_group is 2"),
        ({}, {"layer": "MoE"}, "moe.gated is True: must be False for MegaBlocks' MoE"),
        ({}, {"layer": "moe"}, "layer is 'moe'"),
        ({}, {"names": "olmo"}, "model.moe.norm_topk_prob is True"),
    ],
)
def test_models_that_cannot_be_written(moe: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path):
    config = ModelConfig(**BASE, moe=MoEConfig(**MOE | moe))
    with pytest.raises(ConfigError, match=message):
        megablocks.write(MemorySource(config), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_damaged(tmp_path: Path):
    source = MemorySource(GLU)
    megablocks.write(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="destination"):
        megablocks.write(source, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.mlp.experts.mlp.w1"

    def refused(changed: dict[str, Tensor], error: type[Exception], message: str) -> None:
        save_file(changed, file)
        with pytest.raises(error, match=message):
            megablocks.open(tmp_path / "out")

    refused({k: v for k, v in state.items() if k != name}, RunError, f"missing: {name}")
    refused(state | {"model.extra": torch.ones(2)}, RunError, "model.extra")
    refused(state | {name: state[name][:-6]}, RunError, "w1 has shape")
    bias = "model.layers.0.mlp.experts.bias"
    refused(state | {bias: torch.ones(32)}, ConfigError, f"{bias} is not 0")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    content["model"]["num_layer"] = 3
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="num_layer"):
        megablocks.open(tmp_path / "out")


def test_other_folders_are_not_taken(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("model: {hidden_size: 32}")
    assert not megablocks.is_one(tmp_path)
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert not megablocks.is_one(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    assert not megablocks.is_one(tmp_path)
    assert not megablocks.is_one(tmp_path / "nothing")
