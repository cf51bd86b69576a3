"""Expert parallelism of transformers on our exchange, on two gloo ranks; the cases are in transformers_worker.py."""

import sys
from pathlib import Path

import pytest
from ranks import run_ranks

pytest.importorskip("transformers.distributed.expert_parallel", reason="this transformers has no such interface")
sys.path.insert(0, str(Path(__file__).parent))
import transformers_models
import transformers_worker


def test_two_ranks(tmp_path: Path) -> None:
    for kind in ("mixtral", "qwen3_moe"):
        transformers_models.build(kind).save_pretrained(tmp_path / kind)
    run_ranks(transformers_worker.rank_main, (2, str(tmp_path)), 2)
