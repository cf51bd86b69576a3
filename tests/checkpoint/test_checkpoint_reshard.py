"""What one layout saved, another loads, bit for bit. The work is in reshard_worker.py, on 4 ranks, then 2, then 1."""

import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import reshard_worker

from dmoe.checkpoint.stored_form import stored_form
from dmoe.errors import ConfigError


def test_every_layout_to_every_other(tmp_path):
    run_ranks(reshard_worker.rank_main, (tmp_path,), 4)


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
