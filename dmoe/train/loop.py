"""`train`: the loop, from a configuration to a run directory.

    run_dir/config.yaml, model.json, tokenizer.json     what was run
    run_dir/metrics.jsonl, tensorboard/                  how it went
    run_dir/routing/                                     where held-out tokens went, at each validation
    run_dir/checkpoints/                                 where it got to
    run_dir/.lock                                        held while a process trains in it

Files of the first line are written once the run can start, so a refused request leaves the run directory as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dmoe.checkpoint import (
    AsyncSaver,
    capture_rng,
    find_checkpoints,
    load_latest,
    ranks,
    restore_rng,
    restore_training_state,
    save_checkpoint,
    training_state,
)
from dmoe.config import RunConfig, require
from dmoe.data import Dataset, WindowSampler, prepare
from dmoe.errors import ConfigError, RunError
from dmoe.lora import check_trainable, count_trainable
from dmoe.lora.state import adapters_only, check_base, describe_base
from dmoe.models import count_parameters
from dmoe.observe.hang import HangWatch
from dmoe.ops.regions import region
from dmoe.train.device import memory_gib, peak_tflops
from dmoe.train.engine import Engine, build_engine
from dmoe.train.evaluate import EvalResult, evaluate
from dmoe.train.imbalance import ImbalanceCost
from dmoe.train.launch import join_ranks, name_missing_ranks
from dmoe.train.metrics import MetricsLogger, SilentLogger, load_fields
from dmoe.train.nonfinite import NonFiniteExplainer
from dmoe.train.observers import Observers
from dmoe.train.optim import apply_options, build_optimizer, learning_rate
from dmoe.train.routing_probe import RoutingProbe
from dmoe.train.run_files import describe_run
from dmoe.train.run_lock import RunLock
from dmoe.train.signals import StopRequest
from dmoe.train.step import StepResult, training_step


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    run_dir: Path
    step: int
    """Optimiser steps done."""
    stopped_by: int | None
    """The signal that ended the run early, or None."""
    evaluation: EvalResult | None
    """The last validation on the whole held-out text."""
    zlib_bits_per_byte: float
    """zlib level 9 on the same text."""


@dataclass
class _Window:
    """What happened since the last line of metrics."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    grad_norm: float = float("nan")


@dataclass
class _Progress:
    """The part of the state that is neither model nor optimiser."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    elapsed_seconds: float = 0.0


def train(config: RunConfig, *, resume: bool = False) -> TrainResult:
    """Train until `train.steps`, or until SIGINT or SIGTERM: then finish the step, save and return.

    Under torchrun, or with torch.distributed initialised, every rank calls it; rank 0 writes the run directory.

    Args:
        resume: continue in `config.run_dir` from its newest whole checkpoint, if it has one.

    Raises:
        ConfigError: the configuration does not fit the corpus, the device, the ranks or the run directory.
        RunError: the disk refuses, every checkpoint is damaged, or too many steps in a row were not finite.
    """
    with join_ranks(config) as (device, mesh), RunLock() as lock, contextlib.ExitStack() as stack:
        run_dir = ranks.on_main(lambda: _choose_run_dir(config, resume=resume))
        hang_watch = stack.enter_context(HangWatch(config.profiling, run_dir))
        config = dataclasses.replace(config, run_dir=str(run_dir))
        check_trainable(config.model, config.train)
        if resume:
            config = ranks.on_main(lambda: _with_own_tokenizer(config))
        data = _prepare(config)
        _check_against_data(config, data)
        if resume:
            _check_tokenizer(config, data)
        torch.manual_seed(config.train.seed)
        adapts = config.train.lora.rank > 0
        # A checkpoint wins over the weights that the run began with, but where it holds adapters alone.
        starts = ranks.on_main(lambda: not (resume and find_checkpoints(run_dir)))
        engine = build_engine(config, device, mesh, read_base=starts or adapts)
        base = describe_base(config.train) if adapts else None
        optimizer = build_optimizer(engine.parts, config.optim)
        messages: list[str] = []
        progress = _restore(run_dir, engine, optimizer, base, messages) if resume else _Progress()
        steps = config.train.steps
        require(progress.step <= steps, "train.steps", steps, f"at least the {progress.step} steps already done")
        apply_options(optimizer, config.optim)
        ranks.on_main(lambda: lock.acquire(run_dir))
        # After restoring: a configuration that does not fit the checkpoint must not replace the one that does.
        ranks.on_main(lambda: describe_run(config, data.folder))

        loop = _Loop(config, run_dir, data, engine, optimizer, progress, base)
        loop.observers.add(hang_watch)
        with _open_log(config, run_dir, progress) as log, loop.saver, loop.observers:
            log.console.print(_headline(config, data, device))
            for message in messages:
                log.write({"kind": "event", "step": progress.step, "message": message})
            with StopRequest() as stop, name_missing_ranks(progress):
                return loop.run(log, stop)


class _Loop:
    """Everything one step needs, so that each part of the loop is a short method."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        data: Dataset,
        engine: Engine,
        optimizer: torch.optim.AdamW,
        progress: _Progress,
        base: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.run_dir, self.data = config, run_dir, data
        self.engine, self.optimizer, self.progress, self.base = engine, optimizer, progress, base
        self.sampler = WindowSampler(len(data.train.tokens), config.train.seq_len, config.train.seed)
        self.observers = Observers(config, run_dir, engine, optimizer)
        self.probe = RoutingProbe(config, run_dir, data, engine, progress.step)
        self.imbalance_cost = ImbalanceCost(config, run_dir)
        self.non_finite = NonFiniteExplainer(engine, config.profiling)
        self.window = _Window()
        self.stop_asked = False
        self.flops_per_token = count_parameters(config.model, config.train.seq_len)["flops_per_token"]
        self.peak_tflops = peak_tflops(config.train, engine.device) * ranks.size()
        self.saver: AsyncSaver | contextlib.nullcontext[None] = contextlib.nullcontext()
        if config.checkpoint.async_save:
            self.saver = AsyncSaver()

    def run(self, log: MetricsLogger | SilentLogger, stop: StopRequest) -> TrainResult:
        train, progress = self.config.train, self.progress
        saved_step = progress.step
        while progress.step < train.steps and not self.stop_asked:
            with self.observers.step(progress.step + 1):
                self.step(log, stop)
            done = progress.step == train.steps
            log.console.advance(progress.step, self.window.losses[-1] if self.window.losses else float("nan"))
            if progress.step % train.log_every == 0 or done:
                self.log_training(log)
            if train.eval_every and progress.step % train.eval_every == 0 and not done:
                self.log_evaluation(log, self.evaluate(train.eval_batches))
            every = self.config.checkpoint.every
            if every and progress.step % every == 0:
                self.save()
                saved_step = progress.step
        if saved_step != progress.step:
            self.save()
        if isinstance(self.saver, AsyncSaver):
            self.saver.wait()
        evaluation = None
        if not self.stop_asked:
            evaluation = self.evaluate()
            self.log_evaluation(log, evaluation)
            if not math.isfinite(evaluation.loss):
                raise RunError(f"step {progress.step}: the validation loss is {evaluation.loss}: lower optim.lr")
        # Also one that came during the evaluation, and one that another rank got.
        stopped_by = stop.signum or (signal.SIGTERM if self.stop_asked else None)
        if stopped_by is not None:
            message = f"stopped by signal {int(stopped_by)} after step {progress.step}; saved"
            message += f", continue with --resume {self.run_dir}"
            log.write({"kind": "event", "step": progress.step, "message": message})
        return TrainResult(self.run_dir, progress.step, stopped_by, evaluation, self.data.zlib_bits_per_byte)

    def step(self, log: MetricsLogger | SilentLogger, stop: StopRequest) -> StepResult:
        """One optimiser step, or a skipped one."""
        config, progress = self.config, self.progress
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress.step, config.train.steps, config.optim)
        with region("data"):
            starts = self.sampler.window_starts(progress.step, config.train.batch_size)
            batch = self.engine.batch(self.data.train.tokens, starts)
        self.non_finite.remember()
        # All ranks must stop after the same step, so a signal counts from the step that begins after it.
        result = training_step(self.engine, self.optimizer, batch, config.optim, stop=stop.signum is not None)
        self.stop_asked = result.stop
        progress.step += 1
        if result.finite:
            progress.skipped_in_a_row = 0
            self.window.losses.append(result.loss)
        else:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            self.non_finite.explain(batch, lambda m: log.write({"kind": "event", "step": progress.step, "message": m}))
        self.window.grad_norm = result.grad_norm
        seconds = time.perf_counter() - start
        self.window.seconds += seconds
        self.window.steps += 1
        progress.elapsed_seconds += seconds
        if progress.skipped_in_a_row >= config.train.max_skipped_steps:
            raise RunError(
                f"step {progress.step}: loss {result.loss} and gradient norm {result.grad_norm} in the last of "
                f"{progress.skipped_in_a_row} skipped steps in a row, the limit train.max_skipped_steps; "
                f"the weights are those of step {progress.step - progress.skipped_in_a_row}: "
                "lower optim.lr or look at the data"
            )
        return result

    def log_training(self, log: MetricsLogger | SilentLogger) -> None:
        train, progress, window = self.config.train, self.progress, self.window
        tokens_per_second = window.steps * train.batch_size * train.seq_len / window.seconds
        tflops = tokens_per_second * self.flops_per_token / 1e12
        log.write(
            {
                "kind": "train",
                "step": progress.step,
                "tokens": progress.step * train.batch_size * train.seq_len,
                "loss": sum(window.losses) / len(window.losses) if window.losses else float("nan"),
                "lr": self.optimizer.param_groups[0]["lr"],
                "grad_norm": window.grad_norm,
                "tokens_per_second": tokens_per_second,
                "step_seconds": window.seconds / window.steps,
                "model_tflops": tflops,
                "mfu": tflops / self.peak_tflops,
                "memory_gib": self.peak_memory_gib(),
                "skipped_steps": progress.skipped_steps,
                "elapsed_seconds": progress.elapsed_seconds,
                **load_fields(self.engine.load_summaries(), self.imbalance_cost),
            }
        )
        self.engine.reset_statistics()
        self.window = _Window()

    def peak_memory_gib(self) -> float:
        """Of the rank that needs most."""
        return max(ranks.gather(memory_gib(self.engine.device)))

    def evaluate(self, max_batches: int | None = None) -> EvalResult:
        return evaluate(self.engine, self.data, max_batches=max_batches)

    def log_evaluation(self, log: MetricsLogger | SilentLogger, result: EvalResult) -> None:
        record = {"kind": "eval", "step": self.progress.step, **dataclasses.asdict(result)}
        log.write(record | {"zlib_bits_per_byte": self.data.zlib_bits_per_byte})
        if math.isfinite(result.loss):
            log.write_routing(self.probe.save(self.progress.step))

    def save(self) -> None:
        """A checkpoint of this step; of adapters alone if there are any."""
        state = training_state(self.engine.parts, self.optimizer)
        if self.base is not None:
            state = adapters_only(state, self.base)
        state |= {"rng": capture_rng(), "trainer": dataclasses.asdict(self.progress)}
        save = self.saver.save if isinstance(self.saver, AsyncSaver) else save_checkpoint
        save(self.run_dir, self.progress.step, state, keep=self.config.checkpoint.keep)


def _prepare(config: RunConfig) -> Dataset:
    """The corpus as tokens. One rank of each machine does the work, then the others find it done."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        ranks.on_each(lambda: prepare(config.data))
    else:
        ranks.on_each(lambda: None)
    return ranks.on_each(lambda: prepare(config.data))


def _open_log(config: RunConfig, run_dir: Path, progress: _Progress) -> MetricsLogger | SilentLogger:
    if ranks.rank() != 0:
        return SilentLogger()
    return MetricsLogger(run_dir, config.train.steps, progress.step, tensorboard=config.train.tensorboard)


def _restore(
    run_dir: Path, engine: Engine, optimizer: torch.optim.Optimizer, base: dict[str, Any] | None, messages: list[str]
) -> _Progress:
    parts = engine.parts
    state: dict[str, Any] = training_state(parts, optimizer) | {"rng": capture_rng()}
    model = state["model"]
    if base is not None:
        state = adapters_only(state, base)
    loaded = load_latest(run_dir, state, on_refused=messages.append)
    if loaded is None:
        messages.append("no checkpoint yet: starting at step 0")
        return _Progress()
    step, trainer = loaded
    if base is not None:
        check_base(state["base"], base)
        state["model"] = model | state["model"]
    restore_training_state(parts, optimizer, state)
    restore_rng(state["rng"])
    messages.append(f"resumed from step {step}")
    return _Progress(**trainer)


def _check_against_data(config: RunConfig, data: Dataset) -> None:
    vocab_size = data.tokenizer.vocab_size
    require(
        config.model.vocab_size >= vocab_size,
        "model.vocab_size", config.model.vocab_size, f"at least the tokenizer's {vocab_size}",
    )  # fmt: skip
    shortest = min(len(data.train.tokens), len(data.val.tokens))
    require(
        config.train.seq_len < shortest,
        "train.seq_len", config.train.seq_len, f"less than the {shortest} tokens of the smaller side of the corpus",
    )  # fmt: skip


def _with_own_tokenizer(config: RunConfig) -> RunConfig:
    """The folder that a run began from may be gone; the run has a copy of its tokeniser."""
    own = Path(config.run_dir) / "tokenizer.json"
    if config.train.init_from and own.exists() and not Path(config.data.tokenizer).exists():
        return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(own)))
    return config


def _check_tokenizer(config: RunConfig, data: Dataset) -> None:
    """A corpus that changed gives another trained BPE, whose ids would mean nothing to the checkpoint's weights."""
    ours = Path(config.run_dir) / "tokenizer.json"
    if ours.exists() and ours.read_bytes() != (data.folder / "tokenizer.json").read_bytes():
        raise ConfigError(
            f"data.tokenizer is {config.data.tokenizer!r}: must give the tokenizer that the run began with, "
            f"and the corpus or an option changed it; {str(ours)!r} is that tokenizer"
        )


def _choose_run_dir(config: RunConfig, *, resume: bool) -> Path:
    """The run directory. Raises ConfigError if it holds a run that is not to be resumed."""
    if config.run_dir:
        run_dir = Path(config.run_dir)
    else:
        run_dir = Path("runs") / f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not resume and ((run_dir / "config.yaml").exists() or find_checkpoints(run_dir)):
        raise ConfigError(f"run_dir is {str(run_dir)!r}: must not hold a run already; --resume continues it")
    return run_dir


def _headline(config: RunConfig, data: Dataset, device: torch.device) -> str:
    moe = config.model.moe
    experts = f", {moe.num_experts} experts, top {moe.top_k}" if config.model.moe_layers() else ""
    counts = count_parameters(config.model, config.train.seq_len)
    size = f"{counts['num_params'] / 1e6:,.1f} M parameters, {counts['num_active_params'] / 1e6:,.1f} M active"
    if config.train.freeze or config.train.lora.rank:
        size += f", {count_trainable(config.model, config.train) / 1e6:,.2f} M trained"
    where = str(device) if ranks.size() == 1 else f"{ranks.size()} ranks on {device.type}"
    return (
        f"{config.preset}: {size}{experts}; {len(data.train.tokens):,} training tokens; {where}; "
        f"run directory {config.run_dir}"
    )
