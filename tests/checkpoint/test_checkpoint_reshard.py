"""What one layout saved, another loads, bit for bit. The work is in reshard_worker.py, on 4 ranks, then 2, then 1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmoe.checkpoint.stored_form import stored_form
from dmoe.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_every_layout_to_every_other(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    worker = Path(__file__).with_name("reshard_worker.py")
    commands = [[sys.executable, str(worker), str(rank), str(tmp_path)] for rank in range(4)]
    ranks = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        errors = [process.communicate(timeout=240)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * 4, "\n\n".join(text[-2000:] for text in errors)


def test_stored_form_of_plain_tensors():
    weight, bias = torch.randn(3, 10, 4), torch.randn(3, 10)
    form = stored_form("model.experts.gate_up_proj", weight)
    assert torch.equal(form, torch.stack([weight[:, :5], weight[:, 5:]], 1))
    assert form.data_ptr() == weight.data_ptr(), "loading into the view must reach the parameter"
    assert torch.equal(stored_form("gate_up_proj", form), form)
    moment = stored_form("optimizer.state.experts.gate_up_bias.exp_avg", bias)
    assert torch.equal(moment, torch.stack([bias[:, :5], bias[:, 5:]], 1))
    # Not these: a dense layer of that name, another name, a scalar of the optimiser.
    linear, scalar = torch.randn(10, 4), torch.tensor(1.0)
    assert stored_form("mlp.gate_up_proj.weight", linear) is linear
    assert stored_form("experts.down_proj", weight) is weight
    assert stored_form("state.experts.gate_up_proj.step", scalar) is scalar
    with pytest.raises(ConfigError, match="has 9 rows an expert"):
        stored_form("gate_up_proj", torch.zeros(2, 9, 3))
