"""Tiny random models of transformers, a few of each family, and the same models of ours filled through the mapping."""

from __future__ import annotations

import functools
import inspect
import json
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmoe.checkpoint.formats import families
from dmoe.checkpoint.formats.mapping import Mapping
from dmoe.config import ModelConfig
from dmoe.models import Decoder

# Bytes are tokens. Texts are longer than every window and chunk.
BASE = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10,
    "first_k_dense_replace": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_routed_experts": 6,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0], "short_mscale": 1.1, "long_mscale": 1.2,
    "original_max_position_embeddings": 100,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"rope_parameters": LLAMA3, "num_key_value_heads": 1, "head_dim": 16},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 12}),
    "mixtral": ("mixtral", {"num_local_experts": 6, "sliding_window": 12, "head_dim": 16, "num_key_value_heads": 1}),
    "mixtral-all-experts": (
        "mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    ),
    "olmoe": (
        "olmoe",
        {"num_experts": 6, "num_experts_per_tok": 4, "clip_qkv": 0.7, "attention_bias": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_hidden_layers": 3, "mlp_only_layers": [1], "num_experts": 5, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20, "use_sliding_window": True,
            "sliding_window": 12, "max_window_layers": 1,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_hidden_layers": 3, "decoder_sparse_step": 2, "num_experts": 6, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16, "norm_topk_prob": True, "head_dim": 16,
        },
    ),
    "granitemoe": (
        "granitemoe",
        {
            "num_local_experts": 5, "attention_multiplier": 0.25, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "granitemoeshared": (
        "granitemoeshared", {"num_local_experts": 5, "shared_intermediate_size": 20, "attention_bias": True},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "sliding_window": 12,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        LATENT | {"q_lora_rank": None, "n_shared_experts": 2, "topk_method": "greedy", "rope_parameters": YARN},
    ),
    "deepseek_v2-groups": (
        "deepseek_v2",
        LATENT | {
            "q_lora_rank": 12, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2,
            "routed_scaling_factor": 3.0, "attention_bias": True,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT | {
            "q_lora_rank": 12, "n_group": 2, "topk_group": 1,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v3-one-group": (
        "deepseek_v3",
        LATENT | {
            "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False,
            "first_k_dense_replace": 0, "tie_word_embeddings": True,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 40, "num_local_experts": 3,
            "head_dim": 16, "no_rope_layer_interval": 2, "attention_chunk_size": 12, "floor_scale": 8,
            "rope_parameters": LLAMA3,
        },
    ),
    "llama4-two-experts": (
        "llama4_text",
        {
            "intermediate_size_mlp": 40, "num_local_experts": 6, "num_experts_per_tok": 2, "use_qk_norm": False,
            "attn_temperature_tuning": False, "attention_chunk_size": 12, "head_dim": 8, "no_rope_layers": [0, 1],
            "layer_types": ["chunked_attention", "chunked_attention"], "tie_word_embeddings": True,
        },
    ),
    "phimoe": (
        "phimoe",
        {
            "num_local_experts": 6, "attention_bias": True, "lm_head_bias": True, "rope_parameters": LONGROPE,
            "router_jitter_noise": 0.1, "sliding_window": 12,
        },
    ),
}  # fmt: skip

# The first case of each model type.
ONE_EACH = list({kind: name for name, (kind, _) in reversed(CASES.items())}.values())


class Tensors(NamedTuple):
    """What a directory holds."""

    config_json: dict[str, Any]
    tensors: dict[str, Tensor]


@functools.cache
def theirs(case: str) -> Any:
    """The model of transformers, every parameter and buffer of it random."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind, fields = CASES[case]
    config = transformers.CONFIG_MAPPING[kind](**BASE | json.loads(json.dumps(fields)))
    generator = torch.Generator().manual_seed(sum(case.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() == 1:  # norms, biases, sinks, the bias of the choice
                tensor.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.2 * noise)
            else:
                tensor.copy_(noise * (0.3 if "embed" in name else tensor.shape[-1] ** -0.5))
    return model


@functools.cache
def saved(case: str, fused: bool = False) -> Tensors:
    """What save_pretrained writes."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        theirs(case).save_pretrained(folder, save_original_format=not fused)
        return Tensors(json.loads((Path(folder) / "config.json").read_text()), load_file(f"{folder}/model.safetensors"))


@functools.cache
def family_and_config(case: str) -> tuple[ModuleType, ModelConfig]:
    """The family by the saved config.json, and our config."""
    hf = saved(case).config_json
    family = families.family_of(hf)
    return family, family.to_config(hf)


@functools.cache
def ours(case: str) -> Decoder:
    """Our model with the same weights."""
    family, config = family_and_config(case)
    model = Decoder(config).eval()
    read_into(model.state_dict(), family.mapping(config), saved(case).tensors)
    return model


def read_into(state: dict[str, Tensor], mapping: Mapping, tensors: dict[str, Tensor]) -> None:
    """Copy the stored tensors into ours."""
    with torch.no_grad():
        for stored in mapping:
            for part in stored.parts:
                row = tensors[stored.name]
                row = row if part.stored_index is None else row[part.stored_index]
                target = state[part.ours] if part.index is None else state[part.ours][part.index]
                region, place = part.view(target), part.place(row)
                assert region.shape == place.shape, stored.name
                region.copy_(place)


def written(state: dict[str, Tensor], mapping: Mapping) -> dict[str, Tensor]:
    """The stored tensors made of ours."""
    tensors = {}
    with torch.no_grad():
        for stored in mapping:
            result = torch.full(stored.shape, torch.nan, dtype=stored.dtype or state[stored.parts[0].ours].dtype)
            for part in stored.parts:
                source = state[part.ours] if part.index is None else state[part.ours][part.index]
                row = result if part.stored_index is None else result[part.stored_index]
                part.place(row).copy_(part.view(source))
            tensors[stored.name] = result
    return tensors


def check_mapping(mapping: Mapping, config: ModelConfig) -> None:
    """Every element of ours and of the stored tensors is mapped once, and views of both sides have one shape."""
    shapes = {name: t.shape for name, t in Decoder.on_meta(config).state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    counts: dict[str, Tensor] = defaultdict(lambda: torch.empty(0))
    counts |= {name: torch.zeros(shape) for name, shape in shapes.items()}
    names = [stored.name for stored in mapping]
    assert len(set(names)) == len(names)
    for stored in mapping:
        mapped = torch.zeros(stored.shape)
        for part in stored.parts:
            assert part.ours in shapes, f"{stored.name}: no {part.ours}"
            row = mapped if part.stored_index is None else mapped[part.stored_index]
            target = counts[part.ours] if part.index is None else counts[part.ours][part.index]
            region, place = part.view(target), part.place(row)
            assert region.shape == place.shape, stored.name
            assert region.untyped_storage().data_ptr() == target.untyped_storage().data_ptr(), "a copy, not a view"
            assert place.untyped_storage().data_ptr() == row.untyped_storage().data_ptr(), "a copy, not a view"
            region += 1
            place += 1
        assert (mapped == 1).all() or (stored.padded and mapped.max() <= 1), stored.name
    assert [name for name, count in counts.items() if not (count == 1).all()] == []


@functools.cache
def texts() -> tuple[bytes, ...]:
    """Source of the standard library, of three lengths."""
    source = Path(sysconfig.get_path("stdlib")) / "functools.py"
    text = source.read_bytes() if source.exists() else inspect.getsource(functools).encode()
    return text[400:448], text[1000:1031], text[2000:2007]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The texts as one batch of ids, padded with arbitrary ids on one side, and which are no padding."""
    length = max(map(len, texts()))
    ids, mask = torch.full((3, length), 77), torch.zeros(3, length, dtype=torch.long)
    for row, text in enumerate(texts()):
        place = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
        ids[row, place], mask[row, place] = torch.tensor(list(text)), 1
    return ids, mask
