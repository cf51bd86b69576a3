"""One training step: skipping what is not finite, accumulation, compilation and recomputation."""

import itertools
import json
import math
import os
from functools import partialmethod

import pytest
import tiny_run
import torch

from dmoe.checkpoint import load_model_weights
from dmoe.cli import main
from dmoe.cli.options import build_config
from dmoe.data import WindowSampler, prepare
from dmoe.errors import RunError
from dmoe.models import Decoder
from dmoe.train import build_optimizer, train
from dmoe.train.engine import Batch, Engine
from dmoe.train.step import training_step


def run(tiny, run_dir, **options: str):
    """Train; names are given with "__" for ".". Returns the run directory."""
    options = {name.replace("__", "."): value for name, value in options.items()}
    return train(build_config(None, tiny_run.arguments(tiny | {"run_dir": str(run_dir)} | options))).run_dir


def weights(run_dir) -> dict[str, torch.Tensor]:
    model = Decoder(build_config(str(run_dir / "config.yaml"), []).model)
    load_model_weights(run_dir, model)
    return dict(model.named_parameters())


def nan_at(monkeypatch, *calls: int) -> None:
    """Make the loss of these forward passes (from 0) nan."""
    original, count = Engine.micro_loss, itertools.count()

    def loss(self, batch):
        value = original(self, batch)
        return value * math.nan if torch.is_grad_enabled() and next(count) in calls else value

    monkeypatch.setattr(Engine, "micro_loss", loss)


class TestNotFinite:
    def step(self, tiny, poison):
        config = build_config(None, tiny_run.arguments(tiny))
        torch.manual_seed(0)
        model = Decoder(config.model)
        model.init_weights(0)
        optimizer, engine = build_optimizer(model, config.optim), Engine([model], config.train, torch.device("cpu"))

        def step():
            batch = Batch(torch.randint(0, 256, (4, 32)), torch.randint(0, 256, (4, 32)))
            return training_step(engine, optimizer, batch, config.optim)

        assert step().finite
        before = [p.detach().clone() for p in model.parameters()]
        moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
        handle = poison(model)
        result = step()
        handle.remove()
        assert not result.finite
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        for parameter, old in zip(model.parameters(), moments):
            assert all(torch.equal(old[key], value) for key, value in optimizer.state[parameter].items())
        # The gradients of the skipped step are gone, and the next step is an ordinary one.
        assert step().finite
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))

    def test_loss(self, tiny):
        self.step(tiny, lambda model: model.lm_head.register_forward_hook(lambda m, i, out: out * math.nan))

    def test_one_gradient_with_a_finite_loss(self, tiny):
        self.step(tiny, lambda model: model.norm.weight.register_hook(lambda grad: grad * math.inf))

    def test_one_nan_element(self, tiny):
        def spoil(grad):
            grad = grad.clone()
            grad.view(-1)[3] = math.nan
            return grad

        self.step(tiny, lambda model: model.layers[1].mlp.experts.down_proj.register_hook(spoil))


def test_every_step_reads_its_own_windows(tiny, tmp_path):
    """At a learning rate of nothing, the loss of a step is that of the first weights on that step's text."""
    run_dir = run(tiny, tmp_path / "run", train__steps="4", optim__lr="1e-12", train__seed="3")
    config = build_config(str(run_dir / "config.yaml"), [])
    tokens = torch.tensor(prepare(config.data, progress=False).train.tokens.astype("int64"))
    sampler = WindowSampler(len(tokens), 32, 3)
    model = Decoder(config.model)
    model.init_weights(3)
    expected = []
    for step in range(4):
        windows = torch.stack([tokens[start : start + 33] for start in sampler.window_starts(step, 4)])
        expected.append(model.loss(windows[:, :-1], windows[:, 1:]).item())
    assert list(tiny_run.losses(run_dir).values()) == pytest.approx(expected, abs=1e-6)
    assert len({round(loss, 4) for loss in expected}) == 4


def test_skipped_steps_are_counted(tiny, tmp_path, monkeypatch):
    plain = tiny_run.losses(run(tiny, tmp_path / "plain", train__steps="7", optim__lr="1e-12", checkpoint__every="0"))
    nan_at(monkeypatch, 2 * 2, 3 * 2 + 1)  # step 3 in its first and step 4 in its second micro-batch
    run_dir = run(tiny, tmp_path / "run", train__steps="7", optim__lr="1e-12", checkpoint__every="0")
    lines = tiny_run.train_lines(run_dir)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2, 2]
    assert [line["loss"] for line in lines][2:4] == [None, None]
    # A skipped step uses up its batch: the steps after it read the same text as without it.
    for step in (1, 2, 5, 6, 7):
        assert lines[step - 1]["loss"] == pytest.approx(plain[step], abs=1e-6)
    trainer = json.loads((run_dir / "checkpoints/step-00000007/trainer.json").read_text())["trainer"]
    assert (trainer["skipped_steps"], trainer["skipped_in_a_row"], trainer["step"]) == (2, 0, 7)


def test_skips_that_are_not_in_a_row_do_not_end_the_run(tiny, tmp_path, monkeypatch):
    nan_at(monkeypatch, 2, 6, 10, 14)  # steps 2, 4, 6, 8
    run_dir = run(tiny, tmp_path / "run", train__max_skipped_steps="2", train__steps="9")
    assert tiny_run.train_lines(run_dir)[-1]["skipped_steps"] == 4


def test_too_many_skipped_steps_in_a_row(tiny, tmp_path, monkeypatch, capsys):
    nan_at(monkeypatch, *range(4, 100))
    options = tiny | {"run_dir": str(tmp_path / "run"), "train.max_skipped_steps": "3"}
    assert main(["train", *tiny_run.arguments(options)]) == 1
    line = tiny_run.error_line(capsys.readouterr().err)
    assert line.startswith("step 5: loss nan")
    assert "3 skipped steps in a row, the limit train.max_skipped_steps" in line
    assert "the weights are those of step 2" in line


def test_huge_learning_rate_ends_in_one_line(tiny, tmp_path):
    with pytest.raises(RunError, match=r"train\.max_skipped_steps.*lower optim\.lr"):
        run(tiny, tmp_path / "run", optim__lr="1e30", optim__warmup_steps="0", train__max_skipped_steps="3")


class TestAccumulation:
    @pytest.mark.parametrize("z_loss", ["0.001", "3.0"])
    def test_equals_the_whole_batch(self, tiny, tmp_path, z_loss):
        # The auxiliary loss is defined on a micro-batch, so it is off; the z-loss is a mean and must be exact.
        common = {
            "train__steps": "3", "train__batch_size": "8", "model__moe__aux_loss_coef": "0",
            "model__moe__z_loss_coef": z_loss, "optim__lr": "1e-3", "optim__eps": "1e-4",
        }  # fmt: skip
        whole = run(tiny, tmp_path / "whole", train__micro_batch_size="8", **common)
        parts = run(tiny, tmp_path / "parts", train__micro_batch_size="2", **common)
        a, b = tiny_run.losses(whole), tiny_run.losses(parts)
        assert list(a) == [1, 2, 3]
        assert all(abs(a[step] - b[step]) < 1e-6 for step in a)
        ours, theirs = weights(whole), weights(parts)
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")

    def test_auxiliary_loss_keeps_its_size(self, tiny):
        """Two equal micro-batches give the gradient of one, the load-balancing loss included."""
        one = build_config(None, tiny_run.arguments(tiny | {"train.batch_size": "2", "model.moe.aux_loss_coef": "5"}))
        two = build_config(None, tiny_run.arguments(tiny | {"train.batch_size": "4", "model.moe.aux_loss_coef": "5"}))
        inputs, targets = torch.randint(0, 256, (2, 2, 32))
        norms = []
        for config, repeats in ((one, 1), (two, 2)):
            model = Decoder(config.model)
            model.init_weights(0)
            engine = Engine([model], config.train, torch.device("cpu"))
            batch = Batch(inputs.repeat(repeats, 1), targets.repeat(repeats, 1))
            norms.append(training_step(engine, build_optimizer(model, config.optim), batch, config.optim).grad_norm)
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_activation_checkpointing_gives_the_same_bits(tiny, tmp_path):
    plain = run(tiny, tmp_path / "plain", train__steps="4")
    recomputed = run(tiny, tmp_path / "recomputed", train__steps="4", train__activation_checkpointing="true")
    assert tiny_run.losses(recomputed) == tiny_run.losses(plain)
    ours, theirs = weights(recomputed), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # The second forward is not recorded twice.
    for one, other in zip(tiny_run.train_lines(plain), tiny_run.train_lines(recomputed)):
        assert all(one[key] == other[key] for key in ("expert_load", "aux_loss", "z_loss"))


def test_compile_gives_the_losses_of_eager(tiny, tmp_path, monkeypatch):
    # Inductor takes half a minute to generate and compile C++, so it runs on request. "aot_eager" is all before that:
    # one graph a block without breaks, forward, backward and evaluation.
    backend = os.environ.get("DMOE_TEST_COMPILE_BACKEND", "aot_eager")
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(original, backend=backend))
    options = {"model__num_layers": "1", "train__steps": "2"}
    eager = run(tiny, tmp_path / "eager", **options)
    compiled = run(tiny, tmp_path / "compiled", train__compile="true", **options)
    a, b = tiny_run.losses(eager), tiny_run.losses(compiled)
    assert list(a) == [1, 2]
    assert all(abs(a[step] - b[step]) < 1e-4 for step in a)
    assert weights(compiled).keys() == weights(eager).keys()
