"""A long run of a large model: the page stays small, and so do the time and the memory to make it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from fake_runs import fake_records, write_run

LINES, LAYERS, EXPERTS = 10_000, 32, 128
_MEASURED = """
import json, resource, sys
from pathlib import Path
from dmoe.observe.report import write_report
write_report(Path(sys.argv[1]), png=False)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"cpu_seconds": used.ru_utime + used.ru_stime, "bytes": used.ru_maxrss * 1024}))
"""


def write_large_run(folder, lines=LINES, distinct=25):
    """`lines` log lines of full size, written fast: their loads are `distinct` texts, one after another, each noise on
    the one before, so that neighbours differ as in a run; expert 3 of every fifth layer is dead."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 0.8, (LAYERS, EXPERTS))
    texts = []
    for _ in range(distinct):
        logits = 0.9 * logits + rng.normal(0, 0.35, logits.shape)
        load = np.exp(logits)
        load[::5, 3] = 0
        load /= load.sum(axis=1, keepdims=True)
        texts.append("[" + ",".join("[" + ",".join(map("%.5f".__mod__, row)) + "]" for row in load.tolist()) + "]")
    write_run(folder, [], 10_000, LAYERS, EXPERTS)
    dense = fake_records(0, steps=10_000, log_every=10_000 // lines)
    per_layer = {key: rng.uniform(1, 2, LAYERS).round(4).tolist() for key in ("max_over_mean", "router_entropy")}
    per_layer |= {"moe_layers": list(range(LAYERS)), "aux_loss": 1.1, "z_loss": 4.0}
    per_layer["router_confidence"] = [0.5] * LAYERS
    tail = json.dumps(per_layer)[1:]
    with open(folder / "metrics.jsonl", "w") as file:
        trained = 0
        for record in dense:
            line = json.dumps(record)
            if record["kind"] == "train":
                # A period that the columns do not share: each of them gets other loads.
                line = f'{line[:-1]},"expert_load":{texts[trained % distinct]},{tail}'
                trained += 1
            file.write(line + "\n")
    return folder


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs resource usage of POSIX")
def test_a_long_run_of_a_large_model(tmp_path):
    folder = write_large_run(tmp_path / "large")
    assert (folder / "metrics.jsonl").stat().st_size > 300e6
    command = [sys.executable, "-c", _MEASURED, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    used = json.loads(result.stdout)
    (folder / "metrics.jsonl").unlink()
    assert (folder / "report.html").stat().st_size < 5e6
    assert used["bytes"] < 2 * 2**30
    assert used["cpu_seconds"] < 40  # 14 on one core of a server, with the pictures as files; others are slower
    experts = json.loads((folder / "report.json").read_text())["experts"]
    assert [(one["layer"], one["expert"], one["since_step"]) for one in experts["dead"]] == [
        (layer, 3, 1) for layer in range(0, LAYERS, 5)
    ]
