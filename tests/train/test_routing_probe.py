"""The piece of held-out text whose routing is kept at each validation. Layouts: tests/distributed/."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import arguments, resume

from dmoe.checkpoint import load_model_weights
from dmoe.cli.options import build_config
from dmoe.config import RunConfig
from dmoe.data import prepare
from dmoe.errors import RunError
from dmoe.models import Decoder
from dmoe.moe import moe_layers
from dmoe.observe.routing import load
from dmoe.train import train
from dmoe.train.engine import Engine
from dmoe.train.routing_probe import RoutingProbe, probe_files, probe_windows, thin_out


def names(run_dir: Path) -> list[str]:
    return [path.name for path in probe_files(run_dir / "routing").values()]


def config(seq_len: int, size: int, wanted: int) -> RunConfig:
    base = RunConfig()
    run = replace(base.train, seq_len=seq_len, micro_batch_size=size, batch_size=size)
    return replace(base, train=run, profiling=replace(base.profiling, routing_tokens=wanted))


@pytest.mark.parametrize(
    ("tokens", "seq_len", "size", "wanted", "lengths"),
    [
        (100, 8, 3, 20, [8, 8, 4]),
        (100, 8, 2, 24, [8, 8, 8, 0]),
        (100, 8, 4, 1, [1, 0, 0, 0]),
        (20, 8, 4, 500, [8, 8, 3, 0]),
        (2, 8, 1, 500, [1]),
    ],
)
def test_windows(tokens: int, seq_len: int, size: int, wanted: int, lengths: list[int]) -> None:
    batches = probe_windows(tokens, config(seq_len, size, wanted))
    assert all(len(starts) == len(of) == size for starts, of in batches)
    assert np.concatenate([of for _, of in batches]).tolist() == lengths
    starts = np.concatenate([starts for starts, _ in batches])
    assert starts.tolist() == [i * seq_len if length else 0 for i, length in enumerate(lengths)]


def test_against_a_plain_forward(trained: Path, tmp_path: Path) -> None:
    """One window at a time, without padding, and the picks of each token counted in a loop."""
    run = build_config(str(trained / "config.yaml"), [])
    run = replace(run, profiling=replace(run.profiling, routing_tokens=100))
    model, data = Decoder(run.model), prepare(run.data, progress=False)
    load_model_weights(trained, model)
    engine = Engine([model], run.train, torch.device("cpu"))
    model.train()
    summary = RoutingProbe(run, tmp_path, data, engine, 0).save(5)
    assert summary is not None
    assert model.training
    tokens, seen = torch.tensor(np.array(data.val.tokens[:101]), dtype=torch.int64), {}
    for name, layer in moe_layers(model).items():
        seen[name] = picks = list[tuple[torch.Tensor, torch.Tensor]]()
        layer.router.register_forward_hook(lambda _, __, r, picks=picks: picks.append((r.topk_ids_TK, r.scores_TE)))
    model.eval()
    with torch.no_grad():
        for start in range(0, 100, run.train.seq_len):
            model(tokens[start : min(start + run.train.seq_len, 100)].unsqueeze(0))
    assert (summary.step, summary.num_tokens, summary.layers.tolist()) == (5, 100, [0, 1])
    for i, picks in enumerate(seen.values()):
        ids = torch.cat([ids for ids, _ in picks]).numpy()
        scores = torch.cat([scores for _, scores in picks]).double().numpy()
        counts = np.zeros(4)
        for token in ids:
            counts[token] += 1
        np.testing.assert_array_equal(summary.load_LE[i], counts / counts.sum())
        np.testing.assert_array_equal(summary.picks_LTK[i], np.sort(ids, axis=1))
        np.testing.assert_allclose(summary.prob_LE[i], scores.mean(0), rtol=1e-4)
        np.testing.assert_allclose(summary.confidence_L[i], scores.max(1).mean(), rtol=1e-4)
        # The lists of tokens are of the tokens that were read.
        assert set(summary.token_ids_LEN[i].ravel()) - {-1} <= set(tokens[:100].tolist())
    assert probe_files(tmp_path / "routing").keys() == {5}
    assert json.dumps(load(tmp_path / "routing" / "step-00000005.npz").load_LE.tolist()) == json.dumps(
        summary.load_LE.tolist()
    )


def test_thinning(tmp_path: Path) -> None:
    """Of a long run the first, the last and others at about even distances stay, whatever else is in the folder."""
    (tmp_path / "notes.txt").write_text("mine")
    for step in range(100, 100_100, 100):
        (tmp_path / f"step-{step:08d}.npz").touch()
        thin_out(tmp_path, 6)
    steps = list(probe_files(tmp_path))
    assert len(steps) == 6
    assert (steps[0], steps[-1]) == (100, 100_000)
    gaps = np.diff(steps)
    assert gaps.max() <= 4 * gaps.min(), steps
    assert (tmp_path / "notes.txt").exists()


def test_a_run_keeps_one_a_validation_and_drops_what_was_given_up(tiny: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(build_config(None, arguments(tiny | {"run_dir": str(run_dir), "profiling.routing_tokens": "70"})))
    assert names(run_dir) == ["step-00000005.npz", "step-00000010.npz", "step-00000012.npz"]
    first, last = (load(run_dir / "routing" / f"step-{step:08d}.npz") for step in (5, 12))
    assert first.num_tokens == last.num_tokens == 70
    assert first.text_hash == last.text_hash
    assert not np.array_equal(first.prob_LE, last.prob_LE), "the model has learned in between"
    assert (first.name, first.step) == ("run", 5)
    kept = (run_dir / "routing" / "step-00000005.npz").read_bytes()
    for name in ("step-00000012", "step-00000008"):  # back to step 4
        shutil.rmtree(run_dir / "checkpoints" / name, ignore_errors=True)
    (run_dir / "checkpoints" / "latest").unlink(missing_ok=True)
    changed = build_config(str(run_dir / "config.yaml"), ["--profiling.routing=false"])
    train(changed, resume=True)
    assert names(run_dir) == [], "all are of steps after 4, and it was told to keep none"
    shutil.rmtree(run_dir / "checkpoints" / "step-00000012")
    (run_dir / "checkpoints" / "latest").unlink(missing_ok=True)
    changed = build_config(str(run_dir / "config.yaml"), ["--profiling.routing=true"])
    train(changed, resume=True)
    assert names(run_dir) == ["step-00000010.npz", "step-00000012.npz"]
    again = load(run_dir / "routing" / "step-00000012.npz")
    assert np.array_equal(again.picks_LTK, last.picks_LTK)
    assert kept


def test_it_changes_no_number_of_the_run(tiny: dict[str, str], tmp_path: Path) -> None:
    """Not even where experts are drawn."""
    losses = []
    for on in ("true", "false"):
        options = tiny | {"model.moe.routing": "random", "run_dir": str(tmp_path / on), "profiling.routing": on}
        train(build_config(None, arguments(options)))
        lines = [json.loads(line) for line in (tmp_path / on / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
        assert (tmp_path / on / "routing").exists() == (on == "true")
    assert losses[0] == losses[1]


def test_a_dense_model_has_none(tiny: dict[str, str], tmp_path: Path) -> None:
    options = {
        "model.moe_layer_freq": "0",
        "run_dir": str(tmp_path / "run"),
        "train.steps": "2",
        "train.eval_every": "1",
    }
    train(build_config(None, arguments(tiny | options)))
    assert not (tmp_path / "run" / "routing").exists()


def test_a_disk_that_refuses(tiny: dict[str, str], tmp_path: Path) -> None:
    run: Any = build_config(None, arguments(tiny))
    model = Decoder(run.model)
    engine = Engine([model], run.train, torch.device("cpu"))
    (tmp_path / "routing" / "step-00000001.npz").mkdir(parents=True)
    with pytest.raises(RunError, match="cannot be written"):
        RoutingProbe(run, tmp_path, prepare(run.data, progress=False), engine, 0).save(1)


def test_resumed_at_the_end(tiny: dict[str, str], tmp_path: Path) -> None:
    options = tiny | {"run_dir": str(tmp_path / "run"), "train.steps": "3"}
    train(build_config(None, arguments(options)))
    resume(tmp_path / "run")
    assert names(tmp_path / "run") == ["step-00000003.npz"]
