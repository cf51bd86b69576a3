"""Names and layouts of a Megatron-core GPTModel's tensors, as each rank has them, made of ours.

A rank of tensor parallelism holds rows or columns of each projection; of a gated pair [gate; up] the same rows of both.
Attention is one projection whose rows are, group by group of grouped-query attention: its query heads, its key head,
its value head. Layers and experts are numbered from 0 on each rank of pipeline and expert parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dmoe.checkpoint.formats.mapping import Part, Stored, View, same
from dmoe.config import ModelConfig, require

NormNames = Literal["te", "local"]
ExpertNames = Literal["sequential", "grouped", "weight1"]


@dataclass(frozen=True)
class Form:
    """Which of the names that Megatron has for the same tensors."""

    padded_vocab: int
    """Rows of the embedding, those of all ranks of tensor parallelism together."""
    norms: NormNames = "te"
    """Transformer Engine's layers hold the norm before them, the local ones do not."""
    experts: ExpertNames = "sequential"
    """One module an expert; TEGroupedMLP (a numbered weight an expert); or the older GroupedMLP (all in one tensor)."""


@dataclass(frozen=True)
class Rank:
    """What one rank holds of a model."""

    layers: range
    experts: range
    tp_rank: int = 0
    tp: int = 1
    first: bool = True
    """It has the embedding."""
    last: bool = True
    """It has the final norm and the head."""


def whole_model(config: ModelConfig) -> Rank:
    return Rank(range(config.num_layers), range(config.moe.num_experts))


def padded_vocab(vocab_size: int, divisor: int, tp: int) -> int:
    """Rows of Megatron's embedding: `vocab_size` rounded up to a multiple of divisor * tp."""
    return -(-vocab_size // (divisor * tp)) * divisor * tp


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to routed experts, which ranks of expert parallelism share out."""
    return ".mlp.experts." in name


def is_split(name: str) -> bool:
    """Whether ranks of tensor parallelism hold parts of a tensor; else each has it whole."""
    return is_expert(name) or (
        any(word in name for word in ("linear_", "word_embeddings", "output_layer")) and "layer_norm" not in name
    )


def rank_mapping(config: ModelConfig, rank: Rank, form: Form) -> list[Stored]:
    """The tensors of one rank. Raises ConfigError where the sizes cannot be split."""
    tensors: list[Stored] = []
    if rank.first:
        tensors.append(_vocab("embedding.word_embeddings.weight", "embed_tokens.weight", config, rank, form))
    mixtures = set(config.moe_layers())
    for i in rank.layers:
        theirs, ours = f"decoder.layers.{i - rank.layers.start}.", f"layers.{i}."
        tensors.extend(_attention(theirs, ours, config, rank, form))
        tensors.extend((_moe if i in mixtures else _dense)(theirs, ours, config, rank, form))
    if rank.last:
        tensors.append(same("decoder.final_layernorm.weight", "norm.weight", config.hidden_size))
        # A tied head has its own copy where the embedding is on another rank.
        if not config.tie_embeddings or not rank.first:
            ours = "embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
            tensors.append(_vocab("output_layer.weight", ours, config, rank, form))
    return tensors


def _attention(theirs: str, ours: str, config: ModelConfig, rank: Rank, form: Form) -> Iterator[Stored]:
    D, H = config.hidden_size, config.head_dim
    norm = "input_layernorm.weight" if form.norms == "local" else "self_attention.linear_qkv.layer_norm_weight"
    yield same(theirs + norm, f"{ours}input_layernorm.weight", D)
    theirs, ours = f"{theirs}self_attention.", f"{ours}self_attn."
    yield _fused_qkv(f"{theirs}linear_qkv.weight", ours, "weight", (D,), config, rank)
    if config.qkv_bias:
        yield _fused_qkv(f"{theirs}linear_qkv.bias", ours, "bias", (), config, rank)
    yield _columns(f"{theirs}linear_proj.weight", f"{ours}o_proj.weight", D, config.num_heads * H, rank)
    if config.qk_norm == "head":
        yield same(f"{theirs}q_layernorm.weight", f"{ours}q_norm.weight", H)
        yield same(f"{theirs}k_layernorm.weight", f"{ours}k_norm.weight", H)


def _dense(theirs: str, ours: str, config: ModelConfig, rank: Rank, form: Form) -> Iterator[Stored]:
    D, F = config.hidden_size, config.intermediate_size
    norm = "pre_mlp_layernorm.weight" if form.norms == "local" else "mlp.linear_fc1.layer_norm_weight"
    yield same(theirs + norm, f"{ours}post_attention_layernorm.weight", D)
    yield from _feed_forward(f"{theirs}mlp.", f"{ours}mlp.", D, F, rank)


def _moe(theirs: str, ours: str, config: ModelConfig, rank: Rank, form: Form) -> Iterator[Stored]:
    D, E, moe = config.hidden_size, config.moe.num_experts, config.moe
    yield same(f"{theirs}pre_mlp_layernorm.weight", f"{ours}post_attention_layernorm.weight", D)
    theirs, ours = f"{theirs}mlp.", f"{ours}mlp."
    yield same(f"{theirs}router.weight", f"{ours}router.weight", E, D)
    if moe.expert_bias_rate > 0:
        yield same(f"{theirs}router.expert_bias", f"{ours}router.e_score_correction_bias", E)
    yield from _experts(f"{theirs}experts.", f"{ours}experts.", D, moe.intermediate_size, rank, form)
    if moe.shared_intermediate_size:
        shared = f"{theirs}shared_experts.", f"{ours}shared_experts."
        yield from _feed_forward(*shared, D, moe.shared_intermediate_size, rank)
        if moe.shared_expert_gate:
            yield same(f"{theirs}shared_experts.gate_weight", f"{ours}shared_expert_gate.weight", 1, D)


def _experts(theirs: str, ours: str, D: int, F: int, rank: Rank, form: Form) -> Iterator[Stored]:
    if form.experts == "weight1":
        yield from _experts_in_one(theirs, ours, D, F, rank)
        return
    for e in rank.experts:
        local = e - rank.experts.start
        if form.experts == "sequential":
            fc1, fc2 = (f"{theirs}local_experts.{local}.linear_fc{i}.weight" for i in (1, 2))
        else:
            fc1, fc2 = (f"{theirs}linear_fc{i}.weight{local}" for i in (1, 2))
        lo, hi = _share(F, "moe.intermediate_size", rank)
        n = hi - lo
        gate = Part(f"{ours}gate_up_proj", e, rows(lo, hi), None, rows(0, n))
        up = Part(f"{ours}gate_up_proj", e, rows(F + lo, F + hi), None, rows(n, 2 * n))
        yield Stored(fc1, (2 * n, D), (gate, up))
        yield Stored(fc2, (D, n), (Part(f"{ours}down_proj", e, columns(lo, hi)),))


def _experts_in_one(theirs: str, ours: str, D: int, F: int, rank: Rank) -> Iterator[Stored]:
    """The older GroupedMLP: the memory of weight1 [D, E * 2F] is read as [E, D, 2F], that of weight2 as [E, F, D]."""
    E = len(rank.experts)
    lo, hi = _share(F, "moe.intermediate_size", rank)
    n = hi - lo

    def expert(number: int, *shape: int) -> View:
        return lambda tensor: tensor.view(E, *shape)[number].T

    def half(number: int, start: int) -> View:
        return lambda tensor: tensor.view(E, D, 2 * n)[number].T[start : start + n]

    fc1, fc2 = [], []
    for local, e in enumerate(rank.experts):
        fc1.append(Part(f"{ours}gate_up_proj", e, rows(lo, hi), None, half(local, 0)))
        fc1.append(Part(f"{ours}gate_up_proj", e, rows(F + lo, F + hi), None, half(local, n)))
        fc2.append(Part(f"{ours}down_proj", e, columns(lo, hi), None, expert(local, n, D)))
    yield Stored(f"{theirs}weight1", (D, E * 2 * n), tuple(fc1))
    yield Stored(f"{theirs}weight2", (E * n, D), tuple(fc2))


def _feed_forward(theirs: str, ours: str, D: int, F: int, rank: Rank) -> Iterator[Stored]:
    """A dense gated network: of a dense layer, or the shared expert."""
    lo, hi = _share(F, "moe.shared_intermediate_size" if "shared" in ours else "intermediate_size", rank)
    n = hi - lo
    gate = Part(f"{ours}gate_proj.weight", view=rows(lo, hi), place=rows(0, n))
    up = Part(f"{ours}up_proj.weight", view=rows(lo, hi), place=rows(n, 2 * n))
    yield Stored(f"{theirs}linear_fc1.weight", (2 * n, D), (gate, up))
    yield _columns(f"{theirs}linear_fc2.weight", f"{ours}down_proj.weight", D, F, rank)


def _columns(theirs: str, ours: str, num_rows: int, width: int, rank: Rank) -> Stored:
    lo, hi = _share(width, ours, rank)
    return Stored(theirs, (num_rows, hi - lo), (Part(ours, view=columns(lo, hi)),))


def _vocab(theirs: str, ours: str, config: ModelConfig, rank: Rank, form: Form) -> Stored:
    """Rows in order, padding last."""
    V = config.vocab_size
    first, end = _share(form.padded_vocab, "padded vocabulary", rank)
    lo, hi = min(first, V), min(end, V)
    part = Part(ours, view=rows(lo, hi), place=rows(0, hi - lo))
    return Stored(theirs, (end - first, config.hidden_size), (part,), padded=hi - lo < end - first)


def _fused_qkv(
    theirs: str, ours: str, leaf: str, row_shape: tuple[int, ...], config: ModelConfig, rank: Rank
) -> Stored:
    H, G = config.head_dim, config.num_kv_heads
    heads = {"q_proj": config.num_heads // G, "k_proj": 1, "v_proj": 1}
    lo, hi = _share(G * sum(heads.values()) * H, "width of queries, keys and values", rank)
    parts, start = [], 0
    for g in range(G):
        for name, count in heads.items():
            size = count * H
            a, b = max(start, lo), min(start + size, hi)
            if a < b:  # with fewer groups than ranks, the rows of a group are on several
                offset = g * size - start
                parts.append(
                    Part(f"{ours}{name}.{leaf}", view=rows(a + offset, b + offset), place=rows(a - lo, b - lo))
                )
            start += size
    return Stored(theirs, (hi - lo, *row_shape), tuple(parts))


def _share(size: int, what: str, rank: Rank) -> tuple[int, int]:
    require(size % rank.tp == 0, what, size, f"divisible by tensor parallelism ({rank.tp})")
    n = size // rank.tp
    return rank.tp_rank * n, (rank.tp_rank + 1) * n


def rows(start: int, stop: int) -> View:
    """A view of rows of dim 0."""

    def view(tensor: Tensor) -> Tensor:
        return tensor[start:stop]

    return view


def columns(start: int, stop: int) -> View:
    """A view of columns, dim 1."""

    def view(tensor: Tensor) -> Tensor:
        return tensor[:, start:stop]

    return view
