"""Resuming: damaged checkpoints, requests that do not fit, and what a resumed run leaves untouched."""

import os
import shutil
import signal

import pytest
import tiny_run
import torch

import dmoe.train.device
import dmoe.train.loop
from dmoe.cli import main
from dmoe.cli.options import build_config
from dmoe.train import train

NEWEST, MIDDLE, OLDEST = "step-00000012", "step-00000008", "step-00000004"


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of 12 steps with checkpoints at 4, 8 and 12."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(build_config(None, tiny_run.arguments(tiny | {"run_dir": str(run_dir)})))
    assert tiny_run.checkpoint_names(run_dir) == [OLDEST, MIDDLE, NEWEST]
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "name", "complaint"),
    [
        (truncate, "__0_0.distcp", "__0_0.distcp is truncated"),
        (flip_a_bit, "__0_0.distcp", "__0_0.distcp is altered"),
        (flip_a_bit, ".metadata", ".metadata is altered"),
        (remove, "trainer.json", "trainer.json is missing"),
        (remove, "manifest.json", "manifest.json is missing"),
        (empty, "manifest.json", "manifest.json is damaged"),
    ],
)
def test_damaged_checkpoint_is_refused_and_the_one_before_is_used(finished, run_dir, capsys, damage, name, complaint):
    damage(run_dir / "checkpoints" / NEWEST / name)
    tiny_run.resume(run_dir)
    lines = capsys.readouterr().out.splitlines()
    assert any(f"checkpoint {NEWEST} is refused" in line and complaint in line for line in lines), lines
    assert any("resumed from step 8" in line for line in lines), lines
    done = [line["step"] for line in tiny_run.train_lines(run_dir)]
    assert done == [*range(1, 13), *range(9, 13)]
    assert tiny_run.losses(run_dir) == tiny_run.losses(finished)  # also compares the steps that were done twice


def test_two_damaged_checkpoints(finished, run_dir, capsys):
    truncate(run_dir / "checkpoints" / NEWEST / "__0_0.distcp")
    flip_a_bit(run_dir / "checkpoints" / MIDDLE / "__0_0.distcp")
    tiny_run.resume(run_dir)
    out = capsys.readouterr().out
    assert "__0_0.distcp is truncated" in out
    assert "__0_0.distcp is altered" in out
    assert "resumed from step 4" in out
    assert tiny_run.losses(run_dir) == tiny_run.losses(finished)


def test_all_checkpoints_damaged_is_an_error_and_nothing_is_overwritten(run_dir, capsys):
    for name in (OLDEST, MIDDLE, NEWEST):
        truncate(run_dir / "checkpoints" / name / "__0_0.distcp")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run_dir)]) == 1
    assert "all 3 checkpoints" in tiny_run.error_line(capsys.readouterr().err)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_resume_of_a_finished_run_changes_no_training_line(finished, run_dir):
    tiny_run.resume(run_dir)
    assert tiny_run.train_lines(run_dir) == tiny_run.train_lines(finished)


def test_request_that_does_not_fit_the_checkpoint_leaves_the_run_usable(run_dir, capsys):
    config = (run_dir / "config.yaml").read_bytes()
    assert main(["train", "--resume", str(run_dir), "--model.hidden_size", "64"]) == 2
    line = tiny_run.error_line(capsys.readouterr().err)
    assert "shape" in line
    assert "step-00000012" in line
    assert (run_dir / "config.yaml").read_bytes() == config
    tiny_run.resume(run_dir)


def test_resume_takes_options(run_dir):
    assert main(["train", "--resume", str(run_dir), "--train.steps", "14", "--optim.schedule=constant"]) == 0
    assert [line["step"] for line in tiny_run.train_lines(run_dir)] == list(range(1, 15))


def test_resume_refuses_another_tokenizer(run_dir, capsys):
    before = (run_dir / "tokenizer.json").read_bytes()
    assert main(["train", "--resume", str(run_dir), "--data.tokenizer=bpe", "--data.vocab_size=258"]) == 2
    assert "data.tokenizer is 'bpe'" in tiny_run.error_line(capsys.readouterr().err)
    assert (run_dir / "tokenizer.json").read_bytes() == before


def test_resume_with_the_tokenizer_of_the_run_after_the_corpus_grew(tiny, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(tiny_run.corpus_text(), encoding="utf-8")
    options = tiny | {
        "run_dir": str(tmp_path / "run"), "data.corpus": str(corpus), "data.tokenizer": "bpe",
        "data.vocab_size": "280", "model.vocab_size": "280", "train.steps": "2",
    }  # fmt: skip
    train(build_config(None, tiny_run.arguments(options)))
    corpus.write_text(tiny_run.corpus_text() + "class Something:\n    something = 1\n" * 200, encoding="utf-8")
    more = ["train", "--resume", str(tmp_path / "run"), "--train.steps=4"]
    assert main(more) == 2
    assert main([*more, f"--data.tokenizer={tmp_path / 'run' / 'tokenizer.json'}"]) == 0


def test_one_command_that_is_restarted_until_it_is_done(tiny, tmp_path):
    arguments = [
        "train",
        *tiny_run.arguments(tiny | {"run_dir": str(tmp_path / "run"), "train.steps": "3"}),
        "--resume",
    ]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert [line["step"] for line in tiny_run.train_lines(tmp_path / "run")] == [1, 2, 3]


def test_signal_during_the_last_evaluation_has_its_line_too(tiny, tmp_path, monkeypatch, capsys):
    original = dmoe.train.loop.evaluate

    def evaluate(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(dmoe.train.loop, "evaluate", evaluate)
    options = tiny | {"run_dir": str(tmp_path / "run"), "train.steps": "2"}
    assert main(["train", *tiny_run.arguments(options)]) == 128 + signal.SIGTERM
    assert "stopped by signal 15 after step 2; saved" in capsys.readouterr().out.splitlines()[-1]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # the handler is gone


def test_measuring_the_peak_does_not_move_the_random_state():
    before = torch.get_rng_state()
    assert dmoe.train.device._measured_tflops(torch.device("cpu"), torch.float32, size=64) > 0
    assert torch.equal(torch.get_rng_state(), before)
