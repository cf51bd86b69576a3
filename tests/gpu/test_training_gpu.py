"""The whole way on a GPU: train, stop, resume, generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmoe.cli import main

OPTIONS = [
    "--train.device", "cuda", "--train.batch_size", "8", "--train.micro_batch_size", "4", "--train.seq_len", "64",
    "--train.log_every", "1", "--train.eval_every", "0", "--train.sample_tokens", "0", "--checkpoint.every", "4",
    "--optim.schedule", "constant", "--optim.warmup_steps", "0", "--data.tokenizer", "bytes",
]  # fmt: skip


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_train_resume_generate(tmp_path: Path, compiled: str, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"{i} squared is {i * i}" for i in range(4000)))
    data = ["--data.corpus", str(corpus), "--data.cache_dir", str(tmp_path / "cache")]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = [*OPTIONS, *data, "--train.compile", compiled]
    assert main(["train", *options, "--run_dir", str(straight), "--train.steps", "8"]) == 0
    assert main(["train", *options, "--run_dir", str(broken), "--train.steps", "4"]) == 0
    assert main(["train", "--resume", str(broken), "--train.steps", "8"]) == 0
    expected, actual = losses(straight), losses(broken)
    assert expected[8] < expected[1]
    for step in range(5, 9):
        assert actual[step] == pytest.approx(expected[step], rel=1e-3)
    capsys.readouterr()
    assert main(["generate", str(broken), "--prompt", "7 squared", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("7 squared")
