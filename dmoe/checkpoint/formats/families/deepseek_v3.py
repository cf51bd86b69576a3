"""DeepSeek-V3 (arXiv:2412.19437): sigmoid scores with a bias of the choice, groups by their two best experts."""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import deepseek, fit
from dmoe.config import ModelConfig

MODEL_TYPES = ("deepseek_v3",)
ALLOWED = {
    **deepseek.ALLOWED,
    "rope.interleaved": fit.BOTH,
    "moe.score_function": ("sigmoid",),
    "moe.norm_topk_prob": fit.BOTH,
    "moe.expert_bias_rate": fit.ANY,
}
# The paper's (section 4.2); config.json has none.
BIAS_RATE = 0.001
# The layer that predicts a further token, as in transformers.
IGNORED = (r"^model\.layers\.61\.",)

mapping = deepseek.mapping


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have.

    The layers for predicting further tokens (num_nextn_predict_layers) are left out, as transformers does.
    """
    js.check_neutral(hf, scoring_func=(None, "sigmoid"), topk_method=(None, "noaux_tc"))
    n_group = js.value(hf, "n_group", 8)
    groups = {"n_group": n_group, "topk_group": js.value(hf, "topk_group", 4)}
    groups = groups | {"group_score_top": 2} if n_group > 1 else {}
    hf = {"first_k_dense_replace": 3, "routed_scaling_factor": 2.5, **hf}
    return ModelConfig(
        **deepseek.model_fields(
            hf,
            interleaved=js.value(hf, "rope_interleave", True),
            q_lora_rank=1536,
            score_function="sigmoid",
            norm_topk_prob=js.value(hf, "norm_topk_prob", True),
            expert_bias_rate=BIAS_RATE,
            **groups,
        )
    )


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    moe = config.moe
    needs_bias = bool(config.moe_layers()) and moe.expert_bias_rate == 0
    return (
        fit.misfits(config, ALLOWED)
        + deepseek.rules(config, group_score_top=2)
        + fit.unless(not needs_bias, "model.moe.expert_bias_rate", moe.expert_bias_rate, "greater than 0")
    )


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "deepseek_v3")
    moe = config.moe
    return deepseek.keys(config, "deepseek_v3", "DeepseekV3ForCausalLM") | {
        "n_group": moe.n_group,
        "topk_group": moe.topk_group if moe.n_group > 1 else 1,
        "norm_topk_prob": moe.norm_topk_prob,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": config.rope.interleaved,
        "num_nextn_predict_layers": 0,
    }
