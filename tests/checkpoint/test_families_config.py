"""Families' configurations: published models, refusals by name, and which family expresses a model of ours."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from published_configs import PUBLISHED

from dmoe.checkpoint.formats import families
from dmoe.checkpoint.formats.families.rope import rope_fields
from dmoe.config import ModelConfig, MoEConfig
from dmoe.config.attention import RopeConfig
from dmoe.errors import ConfigError
from dmoe.models import count_parameters
from dmoe.models.presets import PRESETS

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
FURTHER: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v2": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4,
    },
    "deepseek_v3": {
        "n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 8},
    "phimoe": {"num_local_experts": 4},
}  # fmt: skip


def tiny(model_type: str, **changes: Any) -> dict[str, Any]:
    """A config.json; a change to ... removes the key."""
    hf = {"model_type": model_type, **TINY, **FURTHER[model_type], **changes}
    return {key: value for key, value in hf.items() if value is not ...}


def to_config(hf: dict[str, Any]) -> ModelConfig:
    return families.family_of(hf).to_config(hf)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_models(preset: str) -> None:
    hf, num_params = PUBLISHED[preset]
    assert to_config(hf) == PRESETS[preset]
    assert count_parameters(PRESETS[preset], 128)["num_params"] == num_params


@pytest.mark.parametrize("preset", PRESETS)
def test_a_family_expresses_each_preset(preset: str) -> None:
    config = PRESETS[preset]
    family = families.family_for(config)
    back = family.to_config(family.from_config(config))
    # Only what no config.json can say is lost.
    assert back == replace(config, moe=replace(config.moe, z_loss_coef=0.0)) or not config.moe_layers()


@pytest.mark.parametrize("model_type", FURTHER)
def test_each_family_expresses_its_own(model_type: str) -> None:
    config = to_config(tiny(model_type))
    family = families.family_for(config)
    assert model_type in family.MODEL_TYPES
    hf = family.from_config(config)
    assert hf["model_type"] == model_type
    assert hf["architectures"][0].lower().startswith(model_type.replace("_text", "").replace("_", ""))
    assert family.to_config(hf) == config


def test_presets_choose_the_family_that_they_are_of() -> None:
    kinds = {preset: families.name(families.family_for(config)) for preset, config in PRESETS.items()}
    assert kinds | {p: families.name(families.family_of(hf)) for p, (hf, _) in PUBLISHED.items()} == kinds
    assert kinds["tiny-moe"] == kinds["tiny-dense"] == "qwen3_moe"


REFUSED = [
    ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1: must be 0"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1: must be 0"),
    ("mixtral", {"hidden_act": "tanh"}, "hidden_act is 'tanh': must be one of"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu': must be 'silu'"),
    ("qwen3_moe", {"hidden_act": "gelu", "mlp_only_layers": [0]}, "hidden_act is 'gelu': must be 'silu'"),
    ("mixtral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention', 'sliding"),
    ("llama", {"sliding_window": 8}, "sliding_window is 8: must be absent"),
    ("llama", {"hidden_size": ...}, "hidden_size is missing"),
    ("mixtral", {"num_local_experts": None}, "num_local_experts is missing"),
    ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads is 5: must be a divisor"),
    ("llama", {"hidden_size": "32", "head_dim": 8}, "model.hidden_size is '32'"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5': must be a number"),
    ("mixtral", {"num_local_experts": 1}, "moe.top_k is 2: must be at most"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic': must be one of"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor of rope_parameters is missing"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "mscale of rope_parameters is 1.0"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "full_attention of rope_parameters"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: must be 1.0"),
    ("llama", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor is"),
    ("olmoe", {"head_dim": 16}, "head_dim is 16: must be 8"),
    ("qwen2_moe", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types is"),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, "sliding_window is None: must be greater than 0"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True: must be False"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc': must be 'greedy'"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is True: must be False"),
    ("deepseek_v2", {"n_shared_experts": 0}, "n_shared_experts is 0: must be 1 or more"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax': must be 'sigmoid'"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2: must be 4"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0: must be 7.0"),
    ("llama4_text", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ("granitemoe", {"position_embedding_type": "nope"}, "position_embedding_type is 'nope'"),
    ("phimoe", {"num_experts_per_tok": 4}, "num_experts_per_tok is 4: must be 2"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED)
def test_what_would_change_the_maths_is_refused(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        to_config(tiny(model_type, **changes))
    assert message in str(error.value)


def test_harmless_and_neutral_keys_pass() -> None:
    harmless = {"torch_dtype": "bfloat16", "use_cache": False, "my_own": [1, 2], "attention_dropout": 0.0}
    harmless["layer_types"] = ["full_attention"] * 2
    for model_type in FURTHER:
        plain = {} if model_type not in ("gpt_oss", "llama4_text") else {"layer_types": harmless["layer_types"]}
        assert to_config(tiny(model_type, **harmless)) == to_config(tiny(model_type, **plain))


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model_type is 'bert': must be one of llama, mistral, mixtral, .*phimoe"):
        families.family_of({"model_type": "bert"})


def test_older_and_newer_words_for_the_rotary_embedding() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": None}
    old = to_config(tiny("llama", rope_theta=500, rope_scaling=scaling))
    new = to_config(
        tiny(
            "llama", rope_parameters=scaling | {"type": None, "rope_type": "yarn", "rope_theta": 500.0} | {"type": None}
        )
    )
    assert old == new
    assert old.rope == RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=32)
    assert old.rope_theta == 500.0
    beside = rope_fields(
        tiny("llama", original_max_position_embeddings=64, rope_scaling=scaling | {"factor": None}), head_dim=8
    )
    assert beside["rope"] == RopeConfig(scaling="yarn", factor=2.0, original_max_seq_len=64)


def test_defaults_are_those_of_transformers_where_a_file_is_silent() -> None:
    assert to_config(tiny("mixtral", rope_theta=...)).rope_theta == 1e6
    assert to_config(tiny("mixtral", num_key_value_heads=..., num_attention_heads=8)).num_kv_heads == 8
    assert to_config(tiny("llama", num_key_value_heads=...)).num_kv_heads == 4
    assert to_config(tiny("gpt_oss", head_dim=...)).head_dim == 64
    assert to_config(tiny("gpt_oss")).rope == RopeConfig(
        scaling="yarn", factor=32.0, original_max_seq_len=4096, truncate=False
    )
    assert to_config(tiny("gpt_oss")).layer_attention == ("sliding", "full")
    assert to_config(tiny("mistral")).attention_window == 4096
    assert to_config(tiny("mistral", sliding_window=None)).attention_window == 0
    llama4 = to_config(tiny("llama4_text", num_hidden_layers=4, interleave_moe_layer_step=2))
    assert (llama4.layer_rope, llama4.moe_layers()) == ((1, 1, 1, 0), [1, 3])
    assert llama4.layer_attention == ("chunked", "chunked", "chunked", "full")


def test_text_model_of_a_llama_4_with_images() -> None:
    text = tiny("llama4_text")
    nested = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 8}}
    assert to_config(nested) == to_config(text)
    with pytest.raises(ConfigError, match="text_config is missing"):
        to_config({"model_type": "llama4"})


def test_dense_layers_among_mixtures() -> None:
    config = to_config(tiny("qwen3_moe", num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=[3]))
    assert config.moe_layers() == [1]
    family = families.family_for(config)
    assert family.from_config(config)["mlp_only_layers"] == [0, 2, 3, 4]
    ours = replace(config, moe_layer_pattern=(), moe_layer_freq=2, first_k_dense=1)
    assert family.to_config(family.from_config(ours)) == ours


def test_balancing_losses_are_those_of_the_presets() -> None:
    # Theirs weighs one loss over all layers that is K times ours; OLMoE's is a mean over layers; DeepSeek's is ours.
    assert to_config(tiny("mixtral", router_aux_loss_coef=0.3)).moe.aux_loss_coef == 0.3 * 2 / 2
    assert to_config(tiny("olmoe", router_aux_loss_coef=0.3)).moe.aux_loss_coef == 0.3 / 2
    dense = to_config(tiny("qwen3_moe", router_aux_loss_coef=0.3, mlp_only_layers=[0]))
    assert dense.moe.aux_loss_coef == 0.3 * 2
    moe = to_config(tiny("deepseek_v2", aux_loss_alpha=0.3)).moe
    assert (moe.aux_loss_coef, moe.seq_aux_loss_coef) == (0.0, 0.3)
    moe = to_config(tiny("deepseek_v2", aux_loss_alpha=0.3, seq_aux=False)).moe
    assert (moe.aux_loss_coef, moe.seq_aux_loss_coef) == (0.3, 0.0)


OURS = ModelConfig(num_kv_heads=2, qk_norm="none", moe=MoEConfig(num_experts=4))
INEXPRESSIBLE = [
    ({"routing": "expert_choice"}, "model.moe.routing is 'expert_choice': must be 'topk'"),
    ({"routing": "hash"}, "model.moe.routing is 'hash'"),
    ({"gated": False}, "model.moe.gated is False: must be True"),
    ({"capacity_factor": 1.0}, "model.moe.capacity_factor is 1.0: must be 0.0"),
    ({"latent_size": 16}, "model.moe.latent_size is 16: must be 0"),
    ({"expert_bias_rate": 0.001}, "model.moe.expert_bias_rate is 0.001: must be 0.0"),
    ({"router_bias": True}, "model.moe.router_bias is True: must be False"),
    ({"score_function": "sqrtsoftplus"}, "model.moe.score_function is 'sqrtsoftplus'"),
    ({"routed_scaling_factor": 2.0}, "model.moe.routed_scaling_factor is 2.0: must be 1.0"),
    ({"moe_layer_freq": 2}, "model.moe_layer_freq is 2: must be such that"),
    ({"rope": RopeConfig(fraction=0.5)}, "model.rope.fraction is 0.5: must be 1.0"),
    ({"clip_qkv": 3.0}, "model.clip_qkv is 3.0: must be 0.0"),
]


@pytest.mark.parametrize(("changes", "message"), INEXPRESSIBLE)
def test_a_model_that_no_family_expresses_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    moe = {name: value for name, value in changes.items() if name in {field.name for field in fields(MoEConfig)}}
    rest = {name: value for name, value in changes.items() if name not in moe}
    config = replace(OURS, **rest, moe=replace(OURS.moe, **moe))
    with pytest.raises(ConfigError, match="no Hugging Face family can express the model") as error:
        families.family_for(config)
    assert message in str(error.value)
    with pytest.raises(ConfigError, match="in a Hugging Face model of type 'mixtral'"):
        families.FAMILIES[2].from_config(config)


def test_equal_maths_in_other_fields_is_expressed() -> None:
    # Softmax over the chosen logits; full attention and rotary embeddings by list; the usual scale, written out.
    config = replace(
        OURS, attention_scale=64**-0.5, layer_rope=(1,) * 4, layer_attention=("full",) * 4, attention_window=7,
        moe=replace(OURS.moe, softmax_after_topk=True, norm_topk_prob=False, router_dtype="fp64", precision="fp8"),
    )  # fmt: skip
    family = families.family_for(config)
    assert families.name(family) == "mixtral"
    assert family.from_config(config)["sliding_window"] is None


def test_one_field_decides_between_families() -> None:
    cases = [
        ({}, {}, "mixtral"),
        ({"attention_window": 8}, {}, "mixtral"),
        ({"qk_norm": "head"}, {"norm_topk_prob": False}, "qwen3_moe"),
        ({"qkv_bias": True}, {"shared_intermediate_size": 8, "shared_expert_gate": True}, "qwen2_moe"),
        ({}, {"shared_intermediate_size": 8}, "granitemoe"),
        ({"residual_multiplier": 0.5}, {}, "granitemoe"),
        ({"attention_scale": 0.5}, {}, "granitemoe"),
        ({"moe_layer_freq": 0}, {}, "llama"),
        ({"moe_layer_freq": 0, "attention_window": 8}, {}, "mistral"),
        ({"norm": "layer"}, {"routing": "sparsemixer", "norm_topk_prob": False}, "phimoe"),
    ]
    for model, moe, name in cases:
        config = replace(OURS, **model, moe=replace(OURS.moe, **moe))
        assert families.name(families.family_for(config)) == name
