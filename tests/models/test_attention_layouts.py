"""Variants of the decoder train over ranks with the numbers of one process; what a layout cannot do is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import attention_layout_worker as worker

from dmoe.config import ParallelConfig
from dmoe.errors import ConfigError
from dmoe.parallel.context import ContextAttention
from dmoe.parallel.mesh import check_model


@pytest.mark.timeout(600)
def test_layouts(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    torch.save(worker.references(), tmp_path / "references.pt")
    run_ranks(worker.rank_main, (str(tmp_path),), 2)
    failures = "\n".join((tmp_path / f"failures{rank}").read_text() for rank in range(2)).strip()
    assert not failures, failures


def test_latent_attention_is_not_split_over_heads() -> None:
    config = worker.CASES["latent, cp 2"].config("fp32")
    parallel = replace(ParallelConfig(tp=2), dp_shard=1)
    with pytest.raises(ConfigError, match=r"model.latent.kv_lora_rank is 12: must be 0 with parallel.tp \(2\)"):
        check_model(parallel, config.model, config.train)


def test_context_parallel_takes_padding_on_the_right_alone() -> None:
    attend = ContextAttention.__new__(ContextAttention)
    attend.size = 2
    q: Tensor = torch.zeros(1, 4, 2, 4)
    with pytest.raises(ConfigError, match=r"attention_mask with parallel.cp \(2\): must be .* on the right"):
        attend(q, q, q, valid_BU=torch.ones(1, 4, dtype=torch.bool))
