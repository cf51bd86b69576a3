"""What the tests that train share: the options of a tiny run, its corpus, a trained one, and how to read a run.

The conftest.py of each folder imports the fixtures `tiny` and `trained`; the caches make them once for all folders.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dmoe.cli.options import build_config
from dmoe.train import train

# Every value that matters is here, so that new defaults change no test.
OPTIONS = {
    "data.tokenizer": "bytes",
    "model.vocab_size": "260",
    "model.hidden_size": "32",
    "model.num_layers": "2",
    "model.num_heads": "2",
    "model.num_kv_heads": "1",
    "model.head_dim": "16",
    "model.intermediate_size": "64",
    "model.max_seq_len": "64",
    "model.moe.num_experts": "4",
    "model.moe.top_k": "2",
    "model.moe.intermediate_size": "32",
    "optim.lr": "0.003",
    "optim.warmup_steps": "5",
    "profiling.explain_non_finite": "false",  # runs the step again
    "train.steps": "12",
    "train.batch_size": "4",
    "train.micro_batch_size": "2",
    "train.seq_len": "32",
    "train.precision": "fp32",
    "train.device": "cpu",
    "train.log_every": "1",
    "train.eval_every": "5",
    "train.eval_batches": "2",
    "train.peak_tflops": "1",
    "train.tensorboard": "false",
    "train.sample_tokens": "0",
    "checkpoint.every": "4",
    "checkpoint.keep": "3",
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options of a tiny run on a small corpus. Add "run_dir"; `arguments` makes a command line of them."""
    torch.set_num_threads(1)  # as in the processes that tests start: sums are split by thread
    return _with_corpus(tmp_path_factory.getbasetemp())


@cache
def _with_corpus(base: Path) -> dict[str, str]:
    folder = base / "tiny"
    folder.mkdir()
    corpus = folder / "corpus.txt"
    corpus.write_text(corpus_text(), encoding="utf-8")
    return OPTIONS | {"data.corpus": str(corpus), "data.cache_dir": str(folder / "cache")}


@pytest.fixture(scope="session")
def trained(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny model that has learned something, with a BPE. Copy it before changing it."""
    return _trained(tmp_path_factory.getbasetemp())


@cache
def _trained(base: Path) -> Path:
    options = _with_corpus(base) | {
        "run_dir": str(base / "trained"),
        "data.tokenizer": "bpe",
        "data.vocab_size": "300",
        "model.vocab_size": "320",
        "optim.lr": "0.01",
        "optim.warmup_steps": "10",
        "train.steps": "150",
        "train.batch_size": "8",
        "train.micro_batch_size": "8",
        "checkpoint.every": "0",
    }
    return train(build_config(None, arguments(options))).run_dir


def arguments(options: dict[str, str]) -> list[str]:
    """The command line of `options`."""
    return [f"--{name}={value}" for name, value in options.items()]


def corpus_text() -> str:
    """30 kB of Python-like text: few words, so a tiny model learns it in seconds."""
    draw = random.Random(0)
    names = ["alpha", "beta", "gamma", "delta", "naïve"]
    blocks = []
    for i in range(500):
        a, b = draw.sample(names, 2)
        blocks.append(f"def {a}_{i % 10}({b}):\n    return {b} + {draw.randrange(10)}\n\n")
    return "".join(blocks)


def resume(run_dir: Path) -> None:
    """Continue a run, without the report that the command line writes at the end."""
    config = replace(build_config(str(run_dir / "config.yaml"), []), run_dir=str(run_dir))
    train(config, resume=True)


def train_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The "train" lines of metrics.jsonl, in file order."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step. A step that was done twice must have had the same loss and gradient norm, to the last bit."""
    result: dict[int, float] = {}
    norms: dict[int, float] = {}
    for line in train_lines(run_dir):
        step = line["step"]
        assert result.setdefault(step, line["loss"]) == line["loss"], f"step {step} differs from its first time"
        assert norms.setdefault(step, line["grad_norm"]) == line["grad_norm"], f"gradient of step {step} differs"
    return result


def checkpoint_names(run_dir: Path) -> list[str]:
    """Names in the checkpoints folder, `latest` left out."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.name != "latest")


def error_line(stderr: str) -> str:
    """The one line of an error. Progress of the data preparation may come before it; nothing else may."""
    lines = [line for line in stderr.splitlines() if not line.startswith("data: ")]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("dmoe: error: "), stderr
    return lines[0].removeprefix("dmoe: error: ")
