"""What the command for several GPUs would run, and what it makes of the results."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import many_gpus


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_jobs_fit_the_ranks(ranks):
    jobs = {job.name: job for job in many_gpus.jobs(ranks, smoke=False)}
    assert all(math.prod(mesh) == ranks for mesh in many_gpus.meshes(ranks))
    assert {job.ranks for name, job in jobs.items() if name.startswith("weak-")} == {1, 2, 4, 8} & set(range(ranks + 1))
    assert ("full-model" in jobs) == (ranks > 2)
    assert ("mesh-2x2x2" in jobs) == (ranks == 8)
    for job in jobs.values():
        script = many_gpus.ROOT / ("moe_exp" if job.command[0].startswith("test_") else "") / job.command[0]
        assert script.is_file()
        assert job.ranks <= ranks


def test_efficiency_is_over_one_rank():
    def entry(ranks, **rates):
        layouts = {name: {"tokens_per_second": rate} for name, rate in rates.items()} | {"tp": {"problem": "no"}}
        return {"ranks": ranks, "result": {"layouts": layouts}}

    results = {"weak-1": entry(1, fsdp=100.0), "weak-2": entry(2, fsdp=180.0, ep=150.0), "weak-4": {"ranks": 4}}
    assert many_gpus.weak_scaling(results) == {"fsdp": {1: 1.0, 2: 0.9}, "ep": {2: 0.75}}
    assert many_gpus.weak_scaling({"weak-2": results["weak-2"]}) == {}


def test_loss_spread():
    rows = {"one rank": {"loss": 2.0}, "dp": {"loss": 2.01}, "ep": {"loss": 1.96}}
    assert many_gpus.loss_spread({"layouts": {"result": {"rows": rows}}}) == pytest.approx(0.02)
    assert many_gpus.loss_spread({}) is None
