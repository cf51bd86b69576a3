"""`decode_mlp` in Triton's interpreter on the CPU, against the dense fp64 oracle.

The interpreter is chosen when Triton is first imported, so one subprocess runs all cases and saves what it computed;
the tests look at that. Nothing here says that a kernel compiles: tests/gpu/test_decode_gpu.py does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_oracle import ACTIVATIONS, Problem, dense_moe, make_problem, relative_error
from torch import Tensor

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
WAYS = ("per token", "grouped", "table")
_SMALL = {"per token": 0, "grouped": 16}

# Tiles in the tests are 16 weight rows times 16 columns, so these widths need several tiles, and masks.
CASES: dict[str, dict[str, Any]] = {
    "plain case": {"D": 32, "F": 32, "E": 4},
    "masks everywhere": {"T": 7, "D": 40, "F": 37, "E": 5, "K": 3, "bias": True},
    "one token": {"T": 1, "D": 40, "F": 24, "E": 8, "K": 4},
    "one token, three picks": {"T": 1, "D": 40, "F": 37, "E": 7, "K": 3, "bias": True},
    "no token": {"T": 0},
    "one expert": {"E": 1, "K": 1, "bias": True},
    "every expert chosen": {"E": 5, "K": 5, "T": 6},
    "empty experts": {"T": 9, "E": 8, "K": 2, "only_experts": [1, 4, 6]},
    "several tiles an expert": {"T": 37, "E": 3, "K": 1, "only_experts": [2], "bias": True},
    "last expert fills its tiles": {"T": 32, "E": 3, "K": 1, "only_experts": [2]},
    "tiles of every kind": {"T": 40, "E": 6, "K": 2, "only_experts": [0, 2, 5], "bias": True},
    "plain experts": {"gated": False, "bias": True, "activation": "relu2", "F": 20},
    "a width of 1": {"D": 1, "F": 1},
    "bf16": {"T": 3, "dtype": torch.bfloat16, "D": 40, "F": 21, "E": 5, "K": 3, "bias": True},
    "fp16": {"T": 3, "dtype": torch.float16, "D": 40, "F": 21, "E": 5, "K": 3, "bias": True},
}
CASES |= {name: {"T": 5, "activation": name, "bias": True, "h_scale": 6.0} for name in ACTIVATIONS}
# The interpreter's tl.dot multiplies the raw bits of bf16: the grouped way is tested in bf16 on a GPU.
PAIRS = [(case, way) for case in CASES for way in WAYS if case != "bf16" or way == "per token"]


def problem(case: str) -> Problem:
    torch.manual_seed(1234)
    return make_problem(**CASES[case])


def compute(case: str, way: str) -> Tensor:
    """In the subprocess. Fresh memory is NaN, so that what a kernel forgets to write shows."""
    from dmoe.ops.kernels.decode import DecodeTile, DecodeTiles, decode_mlp

    tile = DecodeTile(16, 16, 4, 1)
    tiles = None if way == "table" else DecodeTiles(_SMALL[way], tile, tile)
    p = problem(case)
    return decode_mlp(*p.tensors(), p.activation, tiles=tiles)  # type: ignore[arg-type]


def compute_or_say_why_not(case: str, way: str) -> Tensor | str:
    """So that one case that cannot be computed fails alone."""
    try:
        return compute(case, way)
    except Exception as error:
        while error.__cause__ is not None:  # the interpreter wraps what happens in a kernel, once a call
            error = error.__cause__  # type: ignore[assignment]
        return f"{type(error).__name__}: {str(error)[:300]}"


def sizes_beyond_one_chunk() -> Tensor:
    """More picks than `_group` reads at a time, in int32."""
    from dmoe.ops.kernels.decode import DecodeTile, DecodeTiles, decode_mlp

    p = large_problem()
    tile = DecodeTile(16, 16, 4, 1)
    return decode_mlp(*p.tensors(), p.activation, tiles=DecodeTiles(64, tile, tile))  # type: ignore[arg-type]


def problem_with_a_bias_of_nan() -> Problem:
    """Three picks, side by side in a tile of four; no token chooses expert 0."""
    torch.manual_seed(6)
    p = make_problem(T=1, D=32, F=16, E=24, K=3, bias=True)
    p.topk_ids = p.topk_ids % 23 + 1
    assert p.down_bias is not None
    p.down_bias[0] = torch.nan
    return p


def bias_of_an_expert_that_is_not_chosen() -> Tensor:
    from dmoe.ops.kernels.decode import PER_TOKEN, choose_decode_tiles, decode_mlp

    assert choose_decode_tiles(1, 3, 24) == PER_TOKEN
    p = problem_with_a_bias_of_nan()
    return decode_mlp(*p.tensors(), p.activation)  # type: ignore[arg-type]


def large_problem() -> Problem:
    torch.manual_seed(5)
    p = make_problem(T=350, D=16, F=8, E=9, K=6)
    p.topk_ids = p.topk_ids.int()
    return p


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Tensor]:
    path = tmp_path_factory.mktemp("decode") / "results.pt"
    root = Path(__file__).parents[2]
    search = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": search}
    done = subprocess.run(
        [sys.executable, __file__, str(path)], env=environment, timeout=280, capture_output=True, text=True
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-4000:]}"
    return torch.load(path)


@pytest.mark.parametrize(("case", "way"), PAIRS)
def test_agrees_with_the_oracle(case: str, way: str, computed: dict[tuple[str, str], Tensor]) -> None:
    p, y = problem(case), computed[case, way]
    assert isinstance(y, Tensor), y
    assert y.dtype == p.x.dtype
    assert relative_error(y, dense_moe(p)) <= TOLERANCE[p.x.dtype]


def test_many_picks_and_int32_ids(computed: dict[tuple[str, str], Tensor]) -> None:
    assert relative_error(computed["large", "grouped"], dense_moe(large_problem())) <= 1e-5


def test_bias_of_an_expert_that_is_not_chosen(computed: dict[tuple[str, str], Tensor]) -> None:
    p = problem_with_a_bias_of_nan()
    assert p.down_bias is not None
    p.down_bias[0] = 0
    assert relative_error(computed["bias of NaN", "per token"], dense_moe(p)) <= 1e-5


def test_bits_do_not_change_between_runs(computed: dict[tuple[str, str], Tensor]) -> None:
    for way in ("per token", "grouped"):
        assert torch.equal(computed["masks everywhere", way], computed["again", way])


def test_no_kernel_is_imported_with_the_package() -> None:
    code = "import sys, dmoe, dmoe.ops; assert 'dmoe.ops.kernels.decode' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


if __name__ == "__main__":
    import faster_interpreter

    faster_interpreter.install()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty gives NaN, and the largest integer
    results: dict[tuple[str, str], Tensor | str] = {pair: compute_or_say_why_not(*pair) for pair in PAIRS}
    results |= {("again", way): compute("masks everywhere", way) for way in ("per token", "grouped")}
    results["large", "grouped"] = sizes_beyond_one_chunk()
    results["bias of NaN", "per token"] = bias_of_an_expert_that_is_not_chosen()
    torch.save(results, sys.argv[1])
