"""DeepSeek-V2 (arXiv:2405.04434): softmax scores, groups by their best expert."""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import deepseek, fit
from dmoe.config import ModelConfig
from dmoe.errors import ConfigError

MODEL_TYPES = ("deepseek_v2",)
ALLOWED = {**deepseek.ALLOWED, "rope.interleaved": (True,), "moe.norm_topk_prob": (False,)}

mapping = deepseek.mapping


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have."""
    js.check_neutral(hf, norm_topk_prob=(None, False), scoring_func=(None, "softmax"))
    method = js.value(hf, "topk_method", "greedy")
    groups = {}
    if method == "group_limited_greedy":
        groups = {"n_group": js.needed(hf, "n_group"), "topk_group": js.needed(hf, "topk_group"), "group_score_top": 1}
    elif method != "greedy":
        raise ConfigError(f"config.json: topk_method is {method!r}: must be 'greedy' or 'group_limited_greedy'")
    hf = {"n_shared_experts": 2, **hf}
    return ModelConfig(**deepseek.model_fields(hf, interleaved=True, q_lora_rank=1536, norm_topk_prob=False, **groups))


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    return fit.misfits(config, ALLOWED) + deepseek.rules(config, group_score_top=1)


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "deepseek_v2")
    moe = config.moe
    grouped = moe.n_group > 1
    return deepseek.keys(config, "deepseek_v2", "DeepseekV2ForCausalLM") | {
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "n_group": moe.n_group,
        "topk_group": moe.topk_group if grouped else 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "mlp_bias": False,
    }
