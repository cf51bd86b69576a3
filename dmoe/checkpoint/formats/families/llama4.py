"""Llama 4 (Meta AI, 2025), the text model: chunked attention, layers without rotary embedding, weighted inputs.

Experts are stored transposed. A checkpoint with images keeps this model under `text_config` and `language_model.`.
"""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import fit, tensors
from dmoe.checkpoint.formats.families.layers import as_list, layer_types, moe_fields, rope_layers, window, window_fields
from dmoe.checkpoint.formats.families.rope import rope_fields, rope_parameters
from dmoe.checkpoint.formats.mapping import Stored
from dmoe.config import ModelConfig, MoEConfig

MODEL_TYPES = ("llama4_text", "llama4")
ALLOWED = {
    "qk_norm": ("none", "l2"),
    "qkv_bias": fit.BOTH,
    "attention_out_bias": fit.BOTH,
    "layer_attention": (("full",), ("chunked",), ("chunked", "full")),
    "layer_rope": ((0,), (1,), (0, 1)),
    "rope.scaling": fit.SCALINGS,
    "rope.interleaved": (True,),
    "moe_layer_freq": fit.ANY,
    "moe.activation": fit.ACTIVATIONS,
    "moe.score_function": ("sigmoid",),
    "moe.norm_topk_prob": (False,),
    "moe.weigh_input": (True,),
    "moe.shared_intermediate_size": fit.ANY,
}

# Of a checkpoint with images: before the names of this model's tensors, by model_type, and tensors of the rest.
PREFIX = {"llama4": "language_model."}
IGNORED = (r"^vision_model\.", r"^multi_modal_projector\.")


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have."""
    js.check_neutral(hf)
    if hf.get("model_type") == "llama4":
        hf = js.needed(hf, "text_config")
        js.check_neutral(hf)
    js.check_neutral(hf, router_jitter_noise=(None, 0))
    sizes = js.sizes(hf, eps=1e-5, kv_heads=8, head_dim=128)
    num_layers, width = sizes["num_layers"], js.needed(hf, "intermediate_size")
    mixtures, bias = _moe_layers(hf, num_layers), js.value(hf, "attention_bias", False)
    top_k = js.value(hf, "num_experts_per_tok", 1)
    coefficient = js.number(hf, "router_aux_loss_coef", 0.001)
    return ModelConfig(
        **sizes | {"qk_norm": "l2" if js.value(hf, "use_qk_norm", True) else "none"},
        **rope_fields(hf, theta=5e5, head_dim=sizes["head_dim"], interleaved=True),
        **_attention_fields(hf, num_layers),
        **moe_fields(mixtures, num_layers),
        qkv_bias=bias,
        attention_out_bias=bias,
        intermediate_size=js.value(hf, "intermediate_size_mlp", 16384),
        moe=MoEConfig(
            intermediate_size=width,
            num_experts=js.needed(hf, "num_local_experts", "num_experts"),
            top_k=top_k,
            activation=js.activation(hf, only="silu" if len(mixtures) < num_layers else None),
            score_function="sigmoid",
            norm_topk_prob=False,
            weigh_input=True,
            shared_intermediate_size=width,
            aux_loss_coef=js.loss_per_layer(coefficient, top_k, len(mixtures)),
            z_loss_coef=0.0,
        ),
    )


def _moe_layers(hf: js.Json, num_layers: int) -> list[int]:
    if hf.get("moe_layers") is not None:
        return sorted(as_list(hf["moe_layers"], "moe_layers"))
    step = js.value(hf, "interleave_moe_layer_step", 1)
    return list(range(step - 1, num_layers, step)) if step else []


def _attention_fields(hf: js.Json, num_layers: int) -> js.Json:
    """Of layers with and without rotary embedding; those with one are chunked, unless layer_types says otherwise."""
    rope = as_list(js.value(hf, "no_rope_layers", []), "no_rope_layers")[:num_layers]
    if not rope:
        interval = js.value(hf, "no_rope_layer_interval", 4)
        rope = [int((i + 1) % interval != 0) for i in range(num_layers)]
    types = hf.get("layer_types")
    if types is None:
        types = ["chunked_attention" if has_rope else "full_attention" for has_rope in rope]
    fields = window_fields(hf.get("attention_chunk_size", 8192), types, num_layers, "attention_chunk_size")
    if not all(rope):
        fields["layer_rope"] = tuple(int(has_rope) for has_rope in rope)
        if js.value(hf, "attn_temperature_tuning", True):
            fields["attention_temperature_scale"] = js.number(hf, "attn_scale", 0.1)
            fields["attention_temperature_floor"] = int(js.number(hf, "floor_scale", 8192))
    return fields


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    moe = config.moe
    alike = not config.moe_layers() or moe.shared_intermediate_size == moe.intermediate_size
    found = fit.misfits(config, ALLOWED) + fit.same_biases(config) + fit.silu_if_dense(config)
    wanted = f"{moe.intermediate_size} (moe.intermediate_size)"
    return found + fit.unless(alike, "model.moe.shared_intermediate_size", moe.shared_intermediate_size, wanted)


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "llama4_text")
    moe, mixtures = config.moe, config.moe_layers()
    return js.base(config, "llama4_text", "Llama4ForCausalLM") | {
        "head_dim": config.head_dim,
        "hidden_act": js.HIDDEN_ACT[moe.activation] if mixtures else "silu",
        "intermediate_size": moe.intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm == "l2",
        "moe_layers": mixtures,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "no_rope_layers": rope_layers(config),
        "attention_chunk_size": window(config),
        "layer_types": layer_types(config),
        "attn_temperature_tuning": config.attention_temperature_scale > 0,
        "attn_scale": config.attention_temperature_scale or 0.1,
        "floor_scale": config.attention_temperature_floor,
        "output_router_logits": False,
        "router_aux_loss_coef": js.loss_over_layers(moe.aux_loss_coef, moe.top_k, len(mixtures)),
        "router_jitter_noise": 0.0,
        "rope_parameters": rope_parameters(config),
    }


def mapping(config: ModelConfig, fused: bool = False) -> list[Stored]:
    """The stored tensors, which are fused on disk, too."""
    moe, D, mixtures = config.moe, config.hidden_size, set(config.moe_layers())
    E, F = moe.num_experts, moe.intermediate_size

    def layer_mlp(i: int, stored: str, ours: str) -> list[Stored]:
        stored, ours = f"{stored}.feed_forward", f"{ours}.mlp"
        if i not in mixtures:
            return tensors.feed_forward(stored, ours, D, config.intermediate_size)
        gate_up = tensors.by_row(f"{ours}.experts.gate_up_proj", E, place=tensors.transposed)
        down = tensors.by_row(f"{ours}.experts.down_proj", E, place=tensors.transposed)
        return [
            tensors.router(config, f"{stored}.router.weight", ours),
            Stored(f"{stored}.experts.gate_up_proj", (E, D, 2 * F), gate_up),
            Stored(f"{stored}.experts.down_proj", (E, F, D), down),
            *tensors.feed_forward(f"{stored}.shared_expert", f"{ours}.shared_experts", D, moe.shared_intermediate_size),
        ]

    return tensors.model(config, layer_mlp)
