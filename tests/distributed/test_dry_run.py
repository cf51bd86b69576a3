"""The plan of a run equals what real ranks hold and send; its command says what training would."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmoe.config import DataConfig, ModelConfig, MoEConfig, ParallelConfig, RunConfig, TrainConfig
from dmoe.train.plan import Plan, plan

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import dry_run_check

CONFIG = RunConfig(
    data=DataConfig(tokenizer="bytes"),
    model=ModelConfig(
        vocab_size=203, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
        first_k_dense=1, max_seq_len=64, tie_embeddings=False,
        moe=MoEConfig(intermediate_size=16, num_experts=8, top_k=2),
    ),
    train=TrainConfig(batch_size=24, micro_batch_size=4, seq_len=32, device="cpu", precision="fp32"),
)  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    **dry_run_check.LAYOUTS,
    "hsdp 2 x 2": {"dp_replicate": 2, "dp_shard": 2},
    "cp 2 x fsdp 2": {"cp": 2, "dp_shard": 2},
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: plan(replace(CONFIG, parallel=ParallelConfig(**layout)), 4) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def real() -> dict[str, list[dict[str, Any]]]:
    configs = {name: replace(CONFIG, parallel=ParallelConfig(**layout)) for name, layout in LAYOUTS.items()}
    return dry_run_check.run_for_real(configs, 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_plan_equals_a_real_run(name: str, plans: dict[str, Plan], real: dict[str, list[dict[str, Any]]]) -> None:
    for planned in plans[name].ranks:
        for what, ours, theirs in dry_run_check.differences(planned, real[name][planned.rank]):
            print(planned.rank, what, ours, theirs)
