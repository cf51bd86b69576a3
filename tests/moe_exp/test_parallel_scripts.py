"""test_mesh.py, test_dmoe.py and run_moe_from_scratch.sh as a person starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from script_launch import FOLDER, diagnosis, environment, forked, free_port, start, torchrun

VERIFIED = "verified: loss within 1e-04 and grad_norm within 1e-03 of one process at every step"
SCRIPT = FOLDER / "scripts" / "run_moe_from_scratch.sh"


def test_mesh_despite_exported_variables(tmp_path: Path) -> None:
    values = {"LOCAL_RANK": 0, "WORLD_SIZE": 2, "SMALL": 1, "TP": 2, "USE_LOSS_PARALLEL": 0, "ASSETS": tmp_path}
    result = torchrun("test_mesh.py", "--verify", **values)
    assert result.returncode == 0, result.stderr
    assert "mesh {'replicate': 1, 'shard': 1, 'tp': 2}, ranks [[[0, 1]]]" in result.stdout
    assert "rank 1 at (0, 0, 1): fsdp submesh [[1]] (groups: replicate [1], shard [1]), tp submesh [0, 1]" in (
        result.stdout
    )
    assert "vocabulary 50257 over tp in parts of [25129, 25128], logits assembled on every rank" in result.stdout
    assert result.stdout.count("step ") == 5
    assert VERIFIED in result.stdout
    assert (tmp_path / "mesh_1x1x2_small.png").read_bytes().startswith(b"\x89PNG")


def test_mesh_layouts_of_two_ranks(tmp_path: Path) -> None:
    printed = forked(Path(__file__).with_name("mesh_layouts_worker.py"), output=tmp_path / "printed", ASSETS=tmp_path)
    assert printed.count(VERIFIED) == 5
    for refusal in ("loss refused: loss differs from one process by 2", "grad_norm refused: grad_norm differs"):
        assert printed.count(f"wrong {refusal}") == 2  # on both ranks
    assert len(list(tmp_path.glob("*.png"))) == 5
    # The whole model has 3.67 million fp32 weights: sharded, copied, split; then with experts spread.
    layouts = ("1x2x1", "2x1x1", "1x1x2_loss_parallel", "1x2x1_ep2", "1x1x2_ep2")
    accounts = [json.loads((tmp_path / f"mesh_{layout}_small.json").read_text())["ranks"] for layout in layouts]
    weights = [ranks[0]["categories"]["weights"] / 2**20 for ranks in accounts]
    assert weights == pytest.approx([7.0, 14.0, 7.1, 7.0, 7.1], abs=0.15)
    split, copied = ([held_always(rank) for rank in ranks] for ranks in accounts[:2])
    assert split == pytest.approx([size / 2 for size in copied], rel=0.02)
    for ranks in accounts:
        for rank in ranks:
            assert rank["peak_bytes"] == sum(rank["categories"].values()) == max(size for _, size in rank["curve"])
    assert all(a["peak_bytes"] < b["peak_bytes"] for a, b in zip(*accounts[:2], strict=True))
    files = [str(tmp_path / f"mesh_{layout}_small.json") for layout in layouts[:2]]
    out = tmp_path / "compared.png"
    subprocess.run([sys.executable, "utils_memory.py", *files, "--out", out], cwd=FOLDER, check=True, timeout=120)
    assert out.read_bytes().startswith(b"\x89PNG")


def held_always(rank: dict) -> int:
    """What FSDP splits, in bytes."""
    return sum(rank["largest"][c] for c in ("weights", "gradients", "optimizer state"))


def test_mesh_of_eight_ranks(tmp_path: Path) -> None:
    sizes = {"SMALL": 1, "DP": 2, "SHARD": 2, "TP": 2}
    printed = forked("test_mesh.py", "--verify", nproc=8, output=tmp_path / "printed", ASSETS=tmp_path, **sizes)
    assert VERIFIED in printed
    assert (
        "rank 6 at (1, 1, 0): fsdp submesh [[0, 2], [4, 6]] (groups: replicate [2, 6], shard [4, 6]), "
        "tp submesh [6, 7] (group [6, 7])" in printed
    )


def test_mesh_of_one_rank_and_wrong_sizes(tmp_path: Path) -> None:
    def alone(*arguments: str, **values: object) -> subprocess.Popen:
        shared = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "SMALL": 1, "ASSETS": tmp_path}
        return start("test_mesh.py", *arguments, **shared, MASTER_PORT=free_port(), **values)

    right = alone("--verify")
    wrong = {
        "DP x SHARD x TP is '2 x 1 x 3 = 6': must be the number of ranks, 1": alone(DP=2, TP=3),
        "parallel.ep is 2: must be a divisor of": alone(EP=2),
    }
    out, err = right.communicate(timeout=240)
    assert right.returncode == 0, err
    assert VERIFIED in out
    for expected, process in wrong.items():
        assert expected in diagnosis(process)


def test_dmoe_on_four_ranks() -> None:
    """Experts spread and copied at once; among more tokens some choices are close in bf16."""
    result = torchrun("test_dmoe.py", nproc=4, timeout=200, LOCAL_RANK=0, WORLD_SIZE=4)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "verified: 48 cases on 4 ranks" in result.stdout


def test_dmoe_on_two_ranks() -> None:
    result = torchrun("test_dmoe.py", "--verify", LOCAL_RANK=0, WORLD_SIZE=2)
    assert result.returncode == 0, result.stderr
    assert "verified: 32 cases on 2 ranks" in result.stdout
    lines = result.stdout.splitlines()
    assert sum(line.startswith("glu, 8 experts, dp 2 x ep 2") and line.endswith(" ok") for line in lines) == 4
    assert sum(line.endswith("ok; 1 expert cannot be spread over 2 ranks: run as ep 1") for line in lines) == 8


def from_scratch(*arguments: str, **values: object) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(PATH=path, MASTER_PORT=free_port(), **values)
    return subprocess.run([SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=240)


def test_run_moe_from_scratch(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("def alpha(beta):\n    return beta + 1\n\n" * 200)
    values = {"CORPUS": corpus, "DMOE_CACHE": tmp_path / "cache", "RUN_DIR": tmp_path / "a run", "LOCAL_RANK": 0}
    sizes = {"NPROC": 2, "EP": 2, "MBSZ": 1, "GBSZ": 4, "TRAIN_ITERS": 3, "HIDDEN": 16, "NUM_LAYERS": 2, "SEQ_LEN": 16}
    rates = {"LR": "2e-3", "MIN_LR": "5e-4", "NUM_EXPERTS": 4, "TOPK": 1, "USE_MOE": 1, "MOE_TYPE": "dmoe"}
    result = from_scratch("--train.log_every", "1", **values, **sizes, **rates)
    assert result.returncode == 0, result.stderr
    command = result.stdout.splitlines()[0]
    assert command.startswith("torchrun --nproc_per_node=2 ")
    for option in (
        "-m dmoe.train", "--train.batch_size 4", "--train.micro_batch_size 2", "--parallel.ep 2",
        "--model.moe.num_experts 4", "--model.moe.top_k 1", "--optim.min_lr_ratio 0.25", "--train.log_every 1",
    ):  # fmt: skip
        assert option in command
    assert "2 ranks on cpu" in result.stdout
    assert "step 3/3  loss" in result.stdout
    assert "ep: 2" in (tmp_path / "a run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"MOE_TYPE": "switch"}, "MOE_TYPE is 'switch': must be dmoe"),
        ({"NPROC": 3, "TP": 2}, "3 ranks (NPROC 3 x NNODES 1): must be divisible by TP 2 x PP 1 x CP 1"),
        ({"NPROC": 2, "MBSZ": 3}, "GBSZ is 16: must be divisible by MBSZ 3 x 2 data-parallel ranks = 6"),
        ({"NPROC": 4, "EP": 3}, "NUM_EXPERTS is 8: must be divisible by EP (3)"),
        ({"NPROC": 2, "PP": 2, "EP": 2}, "EP is 2: must divide the 1 data-parallel ranks x CP 1 x TP 1 = 1"),
        ({"NPROC": 2, "PP": 2, "VPP": 3}, "NUM_LAYERS is 4: must be divisible by PP 2 x VPP 3"),
        ({"VPP": 2}, "VPP is 2: must be 1 with PP 1"),
        ({"HIDDEN": 66}, "HIDDEN is 66: must be divisible by NUM_HEADS (4)"),
        ({"USE_MOE": "yes"}, "USE_MOE is 'yes': must be 0 (a dense model) or 1"),
        ({"USE_MOE": 0, "NPROC": 2, "EP": 2}, "EP is 2: must be 1 with USE_MOE 0"),
        ({"MIN_LR": 1}, "LR is '3e-3' and MIN_LR is '1': must be numbers with 0 <= MIN_LR <= LR"),
        ({"GBSZ": "many"}, "GBSZ is 'many': must be a whole number from 1"),
    ],
)  # fmt: skip
def test_run_moe_from_scratch_refuses(values: dict[str, object], expected: str) -> None:
    result = from_scratch(**values)
    assert result.returncode == 2
    assert f"run_moe_from_scratch.sh: {expected}" in result.stderr
    assert "torchrun" not in result.stdout
