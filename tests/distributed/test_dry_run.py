"""The plan of a run equals what real ranks hold and send; its command says what training would."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmoe.cli import main
from dmoe.config import DataConfig, ModelConfig, MoEConfig, ParallelConfig, RunConfig, TrainConfig
from dmoe.observe.memory.categories import EXCHANGE
from dmoe.train.plan import Plan, plan

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import dry_run_check

CONFIG = RunConfig(
    data=DataConfig(tokenizer="bytes"),
    model=ModelConfig(
        vocab_size=203, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
        first_k_dense=1, max_seq_len=64, tie_embeddings=False,
        moe=MoEConfig(intermediate_size=16, num_experts=8, top_k=2),
    ),
    train=TrainConfig(batch_size=20, micro_batch_size=4, seq_len=32, device="cpu", precision="fp32"),
)  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp 2 x ep 2": {"dp_shard": 4, "ep": 2},
    "ep 4, tokens": {"ep": 4, "ep_sends": "tokens"},
    "tp 2 x fsdp 2": {"tp": 2, "dp_shard": 2},
    "pp 2 x fsdp 2": {"pp": 2, "dp_shard": 2},
    "hsdp 2 x 2, cp 2": {"dp_replicate": 2, "cp": 2},
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
    compared = 0
    for planned in plans[name].ranks:
        for what, ours, theirs in dry_run_check.differences(planned, real[name][planned.rank]):
            # Real routing is not balanced; what autograd saves is most, not all, of what lives.
            tolerance = {"activations": 0.1, "sent, ep: all_to_all": 0.1, "peak": 0.1}.get(what, 0)
            assert abs(ours - theirs) <= tolerance * theirs, (planned.rank, what, ours, theirs)
            compared += what.startswith("sent")
    assert compared >= 4


def test_estimate_of_two_ranks_is_that_of_an_account() -> None:
    train = replace(CONFIG.train, activation_checkpointing=True)
    layouts: dict[str, dict[str, Any]] = {"fsdp 2": {"dp_shard": 2}, "tp 2": {"tp": 2}, "pp 2": {"pp": 2}}
    configs = {name: replace(CONFIG, train=train, parallel=ParallelConfig(**p)) for name, p in layouts.items()}
    accounts = dry_run_check.run_for_real(configs, 2)
    for name, config in configs.items():
        for planned in plan(config, 2).ranks:
            measured = accounts[name][planned.rank]["peak"]
            assert planned.total == pytest.approx(sum(measured.values()), rel=0.1), (name, planned.peak, measured)
            assert planned.peak["optimizer state"] == measured["optimizer state"]


def test_traffic_by_hand(plans: dict[str, Plan]) -> None:
    micro_batches, moe_layers, width = 5, 2, 32
    tokens = 32  # of a rank, one sequence of 32
    # HSDP: every unit is gathered from 2 ranks in each micro-batch, in the forward, and again in the backward but for
    # embeddings, head and last norm, which are kept; summed over replicas once.
    rank = plans["hsdp 2 x 2, cp 2"].ranks[0]
    gathered = micro_batches * rank.peak["weights"]
    kept = micro_batches * (rank.parameters["embeddings"] + width // 2) * 4
    assert rank.sent["fsdp: all_gather in forward"] == rank.sent["fsdp: reduce_scatter"] == gathered
    assert rank.sent["fsdp: all_gather in backward"] == gathered - kept
    assert rank.sent["dp_replicate: all_reduce"] == 2 * rank.peak["weights"] // 2
    # Keys and values, 2 heads of 8, go to the other rank that has the sequence; their gradients come back.
    assert rank.sent["cp: all_gather"] == micro_batches * 3 * (2 * tokens * 2 * 8) * 4
    # Sums of 8 counts, 8 probabilities and 7 scalars in fp64, over 4 ranks.
    assert rank.sent["batch: all_reduce of auxiliary losses"] == micro_batches * moe_layers * 23 * 8 * 2 * 3 // 4
    # Half the rows go elsewhere: with a weight there, without one back; gradients likewise; and 4 counts in int64.
    rank = plans["fsdp 2 x ep 2"].ranks[0]
    rows = tokens * 2 // 2
    assert rank.sent["ep: all_to_all"] == micro_batches * moe_layers * (rows * (2 * (width + 1) + 2 * width) * 4 + 32)
    # Two sequences of hidden states to the next stage; the vote on shapes before the first step is 4 bytes.
    rank = plans["pp 2 x fsdp 2"].ranks[0]
    assert abs(rank.sent["pp: send"] - micro_batches * 2 * tokens * width * 4) <= 8


def test_pipeline_continues_to_more_micro_batches(plans: dict[str, Plan]) -> None:
    assert plans["pp 2 x fsdp 2"].micro_batches > 4, "five are run for real and four for the plan"
    assert [r.in_flight for r in plans["pp 2 x fsdp 2"].ranks] == [2, 1]


def test_peak_is_the_sum_of_its_parts_and_worst_routing_needs_more(plans: dict[str, Plan]) -> None:
    for found in plans.values():
        for rank in found.ranks:
            assert all(size >= 0 for size in rank.peak.values())
            assert rank.total >= rank.peak["weights"] + rank.peak["optimizer state"] + rank.activations["checkpointed"]
            assert all(rank.largest[c] >= rank.peak[c] for c in rank.peak)
            assert rank.activations["checkpointed"] < rank.activations["kept"]
    spread = plans["fsdp 2 x ep 2"].ranks[0]
    assert spread.total_worst > spread.total
    # Each token to all of its picks' ranks at once: two ranks' rows instead of one's.
    assert spread.largest_worst[EXCHANGE] > 1.4 * spread.largest[EXCHANGE]


def test_command_prints_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    options = [
        "--model.num_layers",
        "2",
        "--parallel.ep",
        "8",
        "--train.micro_batch_size",
        "64",
        "--train.batch_size=64",
    ]
    assert main(["train", "tiny-moe", "--dry-run", "64", *options, "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "tiny-moe on 64 ranks: dp_shard 64, ep 8; bf16" in printed
    assert "ep: all_to_all" in printed
    written = json.loads(target.read_text())
    assert written["world_size"] == 64
    assert written["ranks"][0]["peak"]["weights"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run", "63"], "train.micro_batch_size is 8: must be divisible by the data-parallel ranks"),
        (["--dry-run", "8", "--parallel.tp", "3"], "the number of ranks is 8: must be divisible by parallel.pp"),
        (["--dry-run", "8", "--parallel.ep", "3"], "parallel.ep is 3: must be a divisor"),
        (["--dry-run", "many"], "--dry-run is 'many': must be the number of ranks"),
        (["--dry-run", "0"], "--dry-run is '0': must be the number of ranks"),
        (["--dry-run"], "--dry-run needs a value"),
        (["--json", "x.json"], "goes with --dry-run"),
        (["--dry-run", "8", "--train.precision", "fp64"], "train.precision is 'fp64'"),
    ],
)
def test_what_does_not_fit_is_said_as_in_training(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "tiny-moe", *arguments]) == 2
    assert words in capsys.readouterr().err
