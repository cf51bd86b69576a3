"""The shared fixtures."""

from pathlib import Path

import pytest
from tiny_run import arguments, tiny

from dmoe.cli.options import build_config
from dmoe.train import train

__all__ = ["base_run", "tiny"]


@pytest.fixture(scope="session")
def base_run(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to start from: a few steps, experts that are no power of two, a tokeniser smaller than the vocabulary."""
    options = tiny | {
        "run_dir": str(tmp_path_factory.mktemp("base") / "run"),
        "data.tokenizer": "bpe",
        "data.vocab_size": "280",
        "model.vocab_size": "300",
        "model.moe.num_experts": "5",
        "optim.lr": "0.01",
        "train.steps": "6",
        "train.eval_every": "0",
        "checkpoint.every": "0",
    }
    return train(build_config(None, arguments(options))).run_dir
