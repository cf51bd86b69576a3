"""The run that the faults are planted in: `dmoe train` of a tiny mixture of experts on sums, in seconds on a CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmoe.cli import main
from dmoe.train import loop

RANK = int(os.environ.get("RANK", "0"))
CORPUS = Path("texts/sums.txt")
OPTIONS = {
    "data.corpus": str(CORPUS),
    "data.tokenizer": "bytes",
    "model.vocab_size": "260",
    "model.hidden_size": "64",
    "model.num_layers": "2",
    "model.num_heads": "2",
    "model.num_kv_heads": "2",
    "model.head_dim": "32",
    "model.max_seq_len": "1024",
    "model.moe.num_experts": "4",
    "model.moe.intermediate_size": "64",
    "train.device": "cpu",
    "train.steps": "8",
    "train.batch_size": "8",
    "train.micro_batch_size": "8",
    "train.seq_len": "64",
    "train.log_every": "1",
    "train.peak_tflops": "1",
    "train.tensorboard": "false",
    "train.sample_tokens": "0",
    "checkpoint.every": "0",
}


def train(**options: str) -> int:
    """`dmoe train` with these options (`__` for a dot), and with those of the command line, which win."""
    if RANK == 0:
        CORPUS.parent.mkdir(exist_ok=True)
        text = "".join(f"{i} plus {j} is {i + j}\n" for i in range(60) for j in range(60))
        # The ranks of one job see a whole file.
        CORPUS.with_suffix(".tmp").write_text(text)
        CORPUS.with_suffix(".tmp").replace(CORPUS)
    named = OPTIONS | {name.replace("__", "."): value for name, value in options.items()}
    return main(["train", *(f"--{name}={value}" for name, value in named.items()), *sys.argv[1:]])


def change_model(change: Callable[[Any], None]) -> None:
    """Have `change(model)` called on each rank when its model has been built."""
    build = loop.build_engine

    def build_and_change(*args: Any, **kwargs: Any) -> Any:
        engine = build(*args, **kwargs)
        change(engine.parts[0])
        return engine

    loop.build_engine = build_and_change  # type: ignore[assignment]


def around_steps(wrap: Callable[[Callable[[], Any], int], Any]) -> None:
    """Have `wrap(run, step)` called in place of each step, which `run()` is."""
    run_step, done = loop.training_step, 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        return wrap(lambda: run_step(*args, **kwargs), done)

    loop.training_step = wrapped  # type: ignore[assignment]
