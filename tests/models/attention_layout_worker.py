"""Variants of the decoder spread over two ranks, in fp64: what a rank of `test_attention_layouts.py` runs."""

from __future__ import annotations

import functools
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
from layout_cases import Case, run_case
from layout_worker import TOLERANCE, compare

from dmoe.config.attention import LatentAttentionConfig, RopeConfig
from dmoe.ops.collectives import leave_process_group
from dmoe.parallel import mesh

SMALL: dict[str, Any] = {"num_layers": 2, "qk_norm": "none", "tie_embeddings": False}
# Of 16 tokens; the original lengths are shorter than a sequence and longer than a rank's part of it.
BIASED = SMALL | {
    "attention_sinks": True, "attention_window": 5, "layer_attention": ("sliding", "full"), "qkv_bias": True,
    "attention_out_bias": True, "mlp_bias": True, "head_bias": True, "norm": "layer", "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6, "logits_divisor": 1.7,
}  # fmt: skip
LATENT = SMALL | {
    "latent": LatentAttentionConfig(
        kv_lora_rank=12, q_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8
    ),
    "rope": RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=12, mscale_all_dim=1.0, interleaved=True),
}
CHUNKED = SMALL | {
    "qk_norm": "l2", "attention_window": 6, "layer_attention": ("chunked", "full"), "layer_rope": (1, 0),
    "attention_temperature_scale": 0.2, "attention_temperature_floor": 3, "clip_qkv": 2.0,
    "rope": RopeConfig(scaling="longrope", short_factors=(1.0, 1.5), long_factors=(2.0, 5.0), original_max_seq_len=12,
                       fraction=0.5, factor=2.0),
}  # fmt: skip
RECOMPUTED = {"activation_checkpointing": True}

CASES = {
    "biased, tp 2 sp": Case({"tp": 2}, BIASED),
    "biased, cp 2": Case({"cp": 2, "ep": 2}, BIASED),
    "biased, pp 2": Case({"pp": 2}, BIASED),
    "latent, fsdp 2": Case({"dp_shard": 2, "ep": 2}, LATENT, train=RECOMPUTED),
    "latent, cp 2": Case({"cp": 2}, LATENT),
    "chunked, tp 2 sp": Case({"tp": 2}, CHUNKED),
    "chunked, cp 2": Case({"cp": 2}, CHUNKED),
}


def references() -> dict[str, Any]:
    """The runs of one process."""
    alone = {case.reference: case.alone for case in CASES.values()}
    return {name: run_case(case.config("fp64"), spread=False) for name, case in alone.items()}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=300))
    mesh.init_device_mesh = functools.cache(mesh.init_device_mesh)  # type: ignore[assignment]
    wanted = torch.load(Path(folder) / "references.pt", weights_only=True)
    failures = []
    for name, case in CASES.items():
        problems = compare(run_case(case.config("fp64"), spread=True), wanted[case.reference], TOLERANCE["fp64"])
        failures += [f"{name}, rank {rank}: {problem}" for problem in problems[:3]]
    (Path(folder) / f"failures{rank}").write_text("\n".join(failures))
    dist.barrier()
    leave_process_group()
