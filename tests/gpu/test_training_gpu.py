"""The whole way on a GPU: train, stop, resume, generate; and through which kernels."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dmoe.cli import main
from dmoe.ops import grouped

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


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts one step of each backend's forward and backward. They are inside operators, so that compiled code
    runs them too and the compiler, which sees an operator from outside, does not."""
    triton_experts = pytest.importorskip("dmoe.ops.triton_experts")
    calls: Counter[str] = Counter()

    def counted(module: Any, name: str, key: str) -> None:
        function = getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            calls[key] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    counted(triton_experts, "up_projection", "triton forward")
    counted(triton_experts, "down_backward_here", "triton backward")
    counted(grouped, "rows_times_weights", "torch")
    return calls


def test_bf16_training_through_the_triton_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps, compiled and not: the loss falls alike, and every expert computation is the triton backend's."""
    steps, micro_batches = 20, 2
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"{i} squared is {i * i}" for i in range(4000)))
    data = ["--data.corpus", str(corpus), "--data.cache_dir", str(tmp_path / "cache")]
    calls = count_calls(monkeypatch)
    found = {}
    for compiled in ("false", "true"):
        calls.clear()
        run = ["--run_dir", str(tmp_path / compiled), "--train.compile", compiled, "--train.precision", "bf16"]
        run += ["--optim.lr", "1e-3"]  # slow enough that rounding does not carry runs apart
        assert main(["train", *OPTIONS, *data, *run, "--train.steps", str(steps)]) == 0
        layers, rest = divmod(calls["triton backward"], steps * micro_batches)
        assert layers >= 1
        assert rest == 0
        assert calls["triton forward"] >= calls["triton backward"]  # the last evaluation adds forwards
        assert calls["torch"] == 0
        found[compiled] = losses(tmp_path / compiled)
    eager, inductor = found["false"], found["true"]
    assert set(eager) == set(inductor) == set(range(1, steps + 1))
    assert all(math.isfinite(loss) for loss in eager.values())
    assert eager[steps] < eager[1] - 2
    for step in eager:
        assert inductor[step] == pytest.approx(eager[step], rel=1e-2), step
