"""gpt-oss (OpenAI, arXiv:2508.10925): attention sinks, windows in every other layer, biases, clamped SwiGLU.

Experts are stored transposed, and a gate's column is followed by its up column.
"""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import fit, tensors
from dmoe.checkpoint.formats.families.layers import layer_types, window, window_fields
from dmoe.checkpoint.formats.families.rope import rope_fields, rope_parameters
from dmoe.checkpoint.formats.mapping import Part, Stored, same
from dmoe.config import ModelConfig, MoEConfig

MODEL_TYPES = ("gpt_oss",)
ALLOWED = {
    "qkv_bias": fit.BOTH,
    "attention_out_bias": fit.BOTH,
    "attention_sinks": (True,),
    "layer_attention": (("full",), ("sliding",), ("full", "sliding")),
    "rope.scaling": fit.SCALINGS,
    "moe.activation": ("clamped_swiglu",),
    "moe.bias": (True,),
    "moe.router_bias": (True,),
}
# What transformers takes where the file has no rope_parameters.
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have."""
    js.check_neutral(hf, swiglu_alpha=(None, 1.702), swiglu_limit=(None, 7.0))
    js.activation(hf, only="silu")
    sizes = js.sizes(hf, eps=1e-5, kv_heads=8, head_dim=64)
    num_layers, width = sizes["num_layers"], js.needed(hf, "intermediate_size")
    top_k, bias = js.needed(hf, "num_experts_per_tok"), js.value(hf, "attention_bias", True)
    with_rope = hf if hf.get("rope_scaling") or hf.get("rope_parameters") else hf | {"rope_parameters": _YARN}
    types = hf.get("layer_types")
    if types is None:
        types = ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
    return ModelConfig(
        **sizes,
        **rope_fields(with_rope, theta=150000.0, head_dim=sizes["head_dim"]),
        **window_fields(hf.get("sliding_window", 128), types, num_layers, "sliding_window"),
        qkv_bias=bias,
        attention_out_bias=bias,
        attention_sinks=True,
        intermediate_size=width,
        moe=MoEConfig(
            intermediate_size=width,
            num_experts=js.needed(hf, "num_local_experts", "num_experts"),
            top_k=top_k,
            activation="clamped_swiglu",
            bias=True,
            router_bias=True,
            softmax_after_topk=True,
            aux_loss_coef=js.loss_per_layer(js.number(hf, "router_aux_loss_coef", 0.001), top_k, num_layers),
            z_loss_coef=0.0,
        ),
    )


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    return fit.misfits(config, ALLOWED) + fit.same_biases(config)


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "gpt_oss")
    moe = config.moe
    return js.base(config, "gpt_oss", "GptOssForCausalLM") | {
        "head_dim": config.head_dim,
        "intermediate_size": moe.intermediate_size,
        "attention_bias": config.qkv_bias,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "output_router_logits": False,
        "router_aux_loss_coef": js.loss_over_layers(moe.aux_loss_coef, moe.top_k, config.num_layers),
        "rope_parameters": rope_parameters(config),
        "sliding_window": window(config),
        "layer_types": layer_types(config),
    }


def mapping(config: ModelConfig, fused: bool = False) -> list[Stored]:
    """The stored tensors, which are fused on disk, too."""
    E, D, F = config.moe.num_experts, config.hidden_size, config.moe.intermediate_size

    def halves(ours: str, e: int | None, *, transpose: bool) -> tuple[Part, Part]:
        """Gate and up of ours, which follow each other, and the columns that take turns."""
        gate, up = (tensors.every_other_column(start, transpose=transpose) for start in (0, 1))
        columns = e is None
        return (
            Part(ours, e, tensors.first_columns(F) if columns else tensors.first_rows(F), e, gate),
            Part(ours, e, tensors.columns_from(F) if columns else tensors.rows_from(F), e, up),
        )

    def layer_mlp(_: int, stored: str, ours: str) -> list[Stored]:
        stored, ours = f"{stored}.mlp", f"{ours}.mlp"
        gate_up = [part for e in range(E) for part in halves(f"{ours}.experts.gate_up_proj", e, transpose=True)]
        down = tensors.by_row(f"{ours}.experts.down_proj", E, place=tensors.transposed)
        bias = halves(f"{ours}.experts.gate_up_bias", None, transpose=False)
        return [
            tensors.router(config, f"{stored}.router.weight", ours),
            same(f"{stored}.router.bias", f"{ours}.router.bias", E),
            Stored(f"{stored}.experts.gate_up_proj", (E, D, 2 * F), tuple(gate_up)),
            Stored(f"{stored}.experts.gate_up_proj_bias", (E, 2 * F), bias),
            Stored(f"{stored}.experts.down_proj", (E, F, D), down),
            same(f"{stored}.experts.down_proj_bias", f"{ours}.experts.down_bias", E, D),
        ]

    return tensors.model(config, layer_mlp)
