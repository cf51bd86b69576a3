"""The parts that Hugging Face layouts are made of, as lists of stored tensors.

Legend of shapes: D model width, F width of a feed-forward network, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmoe.checkpoint.formats.mapping import Part, Stored, View, same
from dmoe.config import ModelConfig


def first_rows(count: int) -> View:
    """The first `count` rows."""
    return lambda tensor: tensor[:count]


def rows_from(start: int) -> View:
    """The rows from `start` on."""
    return lambda tensor: tensor[start:]


def first_columns(count: int) -> View:
    """The first `count` columns."""
    return lambda tensor: tensor[:, :count]


def columns_from(start: int) -> View:
    """The columns from `start` on."""
    return lambda tensor: tensor[:, start:]


def transposed(tensor: Tensor) -> Tensor:
    """A matrix with its dimensions exchanged."""
    return tensor.t()


def every_other_column(start: int, *, transpose: bool = False) -> View:
    """The columns start, start + 2, ... of a matrix, as columns or as rows."""
    if transpose:
        return lambda tensor: tensor[:, start::2].t()
    return lambda tensor: tensor[:, start::2]


def linear(stored: str, ours: str, n_out: int, n_in: int, bias: bool = False) -> list[Stored]:
    """A `nn.Linear` under another name."""
    weight = same(f"{stored}.weight", f"{ours}.weight", n_out, n_in)
    return [weight, same(f"{stored}.bias", f"{ours}.bias", n_out)] if bias else [weight]


def norm(config: ModelConfig, stored: str, ours: str) -> list[Stored]:
    """A norm over D, with a bias if it is a LayerNorm."""
    weight = same(f"{stored}.weight", f"{ours}.weight", config.hidden_size)
    return [weight, same(f"{stored}.bias", f"{ours}.bias", config.hidden_size)] if config.norm == "layer" else [weight]


def attention(config: ModelConfig, stored: str, ours: str) -> list[Stored]:
    """Grouped-query or latent attention, with the biases, norms and sinks that the config has."""
    if config.latent.kv_lora_rank:
        return _latent_attention(config, stored, ours)
    D, bias = config.hidden_size, config.qkv_bias
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = [
        *linear(f"{stored}.q_proj", f"{ours}.q_proj", q_width, D, bias),
        *linear(f"{stored}.k_proj", f"{ours}.k_proj", kv_width, D, bias),
        *linear(f"{stored}.v_proj", f"{ours}.v_proj", kv_width, D, bias),
        *linear(f"{stored}.o_proj", f"{ours}.o_proj", D, q_width, config.attention_out_bias),
    ]
    if config.qk_norm in ("head", "full"):
        per_head = config.qk_norm == "head"
        for name, width in (("q_norm", q_width), ("k_norm", kv_width)):
            width = config.head_dim if per_head else width
            tensors.append(same(f"{stored}.{name}.weight", f"{ours}.{name}.weight", width))
    if config.attention_sinks:
        tensors.append(same(f"{stored}.sinks", f"{ours}.sinks", config.num_heads))
    return tensors


def _latent_attention(config: ModelConfig, stored: str, ours: str) -> list[Stored]:
    latent, D, heads = config.latent, config.hidden_size, config.num_heads
    q_width = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
    rank, bias = latent.kv_lora_rank, config.qkv_bias

    def one(name: str, n_out: int, n_in: int, bias: bool = False) -> list[Stored]:
        return linear(f"{stored}.{name}", f"{ours}.{name}", n_out, n_in, bias)

    def latent_norm(name: str, width: int) -> Stored:
        return same(f"{stored}.{name}.weight", f"{ours}.{name}.weight", width)

    if latent.q_lora_rank:
        queries = [
            *one("q_a_proj", latent.q_lora_rank, D, bias),
            latent_norm("q_a_layernorm", latent.q_lora_rank),
            *one("q_b_proj", q_width, latent.q_lora_rank),
        ]
    else:
        queries = one("q_proj", q_width, D)
    return [
        *queries,
        *one("kv_a_proj_with_mqa", rank + latent.qk_rope_head_dim, D, bias),
        latent_norm("kv_a_layernorm", rank),
        *one("kv_b_proj", heads * (latent.qk_nope_head_dim + latent.v_head_dim), rank),
        *one("o_proj", D, heads * latent.v_head_dim, config.attention_out_bias),
    ]


def feed_forward(stored: str, ours: str, hidden_size: int, width: int, bias: bool = False) -> list[Stored]:
    """A gated network of `width`: a dense layer's or the shared expert."""
    return [
        *linear(f"{stored}.gate_proj", f"{ours}.gate_proj", width, hidden_size, bias),
        *linear(f"{stored}.up_proj", f"{ours}.up_proj", width, hidden_size, bias),
        *linear(f"{stored}.down_proj", f"{ours}.down_proj", hidden_size, width, bias),
    ]


def experts_one_by_one(config: ModelConfig, stored: str, ours: str, gate: str, up: str, down: str) -> list[Stored]:
    """Three matrices an expert: `stored`.e.`gate`.weight and so on."""
    D, F = config.hidden_size, config.moe.intermediate_size
    tensors = []
    for e in range(config.moe.num_experts):
        gate_part = Part(f"{ours}.gate_up_proj", e, first_rows(F))
        up_part = Part(f"{ours}.gate_up_proj", e, rows_from(F))
        tensors += [
            Stored(f"{stored}.{e}.{gate}.weight", (F, D), (gate_part,)),
            Stored(f"{stored}.{e}.{up}.weight", (F, D), (up_part,)),
            Stored(f"{stored}.{e}.{down}.weight", (D, F), (Part(f"{ours}.down_proj", e),)),
        ]
    return tensors


def experts_fused(config: ModelConfig, gate_up: str, down: str, ours: str) -> list[Stored]:
    """Two tensors as we have them: [E, 2F, D], rows gate then up, and [E, D, F]."""
    E, D, F = config.moe.num_experts, config.hidden_size, config.moe.intermediate_size
    return [
        Stored(gate_up, (E, 2 * F, D), by_row(f"{ours}.gate_up_proj", E)),
        Stored(down, (E, D, F), by_row(f"{ours}.down_proj", E)),
    ]


def by_row(ours: str, count: int, *, view: View | None = None, place: View | None = None) -> tuple[Part, ...]:
    """A part for each row of dim 0, so that large tensors are handled an expert at a time."""
    regions = {name: region for name, region in (("view", view), ("place", place)) if region is not None}
    return tuple(Part(ours, e, stored_index=e, **regions) for e in range(count))


def model(config: ModelConfig, layer_mlp: Callable[[int, str, str], list[Stored]]) -> list[Stored]:
    """The whole model: embedding, layers, last norm and, unless it is tied, head.

    Args:
        layer_mlp: from a layer's number, its prefix in the stored model and in ours, the tensors of its network.
    """
    V, D = config.vocab_size, config.hidden_size
    tensors = [same("model.embed_tokens.weight", "embed_tokens.weight", V, D)]
    for i in range(config.num_layers):
        stored, ours = f"model.layers.{i}", f"layers.{i}"
        tensors += norm(config, f"{stored}.input_layernorm", f"{ours}.input_layernorm")
        tensors += attention(config, f"{stored}.self_attn", f"{ours}.self_attn")
        tensors += norm(config, f"{stored}.post_attention_layernorm", f"{ours}.post_attention_layernorm")
        tensors += layer_mlp(i, stored, ours)
    tensors += norm(config, "model.norm", "norm")
    if not config.tie_embeddings:
        tensors.append(same("lm_head.weight", "lm_head.weight", V, D))
    if config.head_bias:
        tensors.append(same("lm_head.bias", "lm_head.bias", V))
    return tensors


def experts_in(config: ModelConfig, stored: str, ours: str, fused: bool) -> list[Stored]:
    """Experts under `stored`: one by one as gate_proj, up_proj and down_proj, or fused."""
    if fused:
        return experts_fused(config, f"{stored}.gate_up_proj", f"{stored}.down_proj", ours)
    return experts_one_by_one(config, stored, ours, "gate_proj", "up_proj", "down_proj")


def router(config: ModelConfig, stored: str, ours: str) -> Stored:
    """The router's weight [E, D], under a name of its own."""
    return same(stored, f"{ours}.router.weight", config.moe.num_experts, config.hidden_size)


def correction_bias(config: ModelConfig, stored: str, ours: str) -> Stored:
    """The bias of the choice of experts, which is fp32 whatever the dtype of the model."""
    parts = (Part(f"{ours}.e_score_correction_bias"),)
    return Stored(f"{stored}.e_score_correction_bias", (config.moe.num_experts,), parts, dtype=torch.float32)
