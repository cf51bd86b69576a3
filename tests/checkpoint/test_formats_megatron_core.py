"""Our Megatron files in megatron-core itself, and its files here (formats_megatron_worker.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ranks import run_ranks

from dmoe.checkpoint.formats import megatron

sys.path.insert(0, str(Path(__file__).parent))
import formats_megatron_launch
from formats_megatron_cases import CONFIGS, MemorySource


def test_two_ranks_of_megatron_core(tmp_path: Path):
    pytest.importorskip("megatron.core.package_info", reason="megatron-core is not installed (extra dev)")
    for name, config in CONFIGS.items():
        source = MemorySource(config)
        common = {"norms": "local", "vocab_divisor": 16}
        megatron.write(source, tmp_path / f"{name} legacy", files="legacy", **common)
        for kind in ("tp", "pp") + (("ep",) if config.moe_layers() else ()):
            if (name, kind) != ("qwen2", "tp"):
                megatron.write(source, tmp_path / f"{name} legacy {kind}", files="legacy", **common, **{kind: 2})
        for norms in ("local", "te"):
            megatron.write(source, tmp_path / f"{name} torch_dist {norms}", norms=norms, vocab_divisor=16)
    run_ranks(formats_megatron_launch.run_rank, (str(tmp_path),), 2)
