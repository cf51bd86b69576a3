"""The tools of config section `profiling`, each made only when asked for and told when a step begins and ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from dmoe.config import RunConfig
from dmoe.train.engine import Engine


class Tool(Protocol):
    """Watches optimiser steps. A tool whose methods exchange messages has them called on every rank."""

    def begin(self, step: int) -> None:
        """Before step `step`, which counts from 1."""

    def end(self, step: int) -> None:
        """After it."""

    def close(self) -> None:
        """Write what is left; called once, also when the run fails."""

    # failed(error), if a tool has it, is called in place of `end` when a step raised an error. What it raises goes on
    # in place of that error.


class Observers:
    """All tools of a run. `with observers: ... with observers.step(n): ...`"""

    def __init__(self, config: RunConfig, run_dir: Path, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
        self._tools = list(_make_tools(config, run_dir, engine, optimizer))

    def add(self, tool: Tool) -> None:
        """Let a tool that began earlier hear of the steps, before all others."""
        self._tools.insert(0, tool)

    def __enter__(self) -> Observers:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:
            for tool in self._tools:
                stack.callback(tool.close)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one optimiser step and the reading of its data."""
        for tool in self._tools:
            tool.begin(step)
        try:
            yield
        except Exception as error:
            for tool in reversed(self._tools):
                getattr(tool, "failed", _ignore)(error)
            raise
        for tool in reversed(self._tools):
            tool.end(step)


def _make_tools(config: RunConfig, run_dir: Path, engine: Engine, optimizer: torch.optim.Optimizer) -> Iterator[Tool]:
    profiling, device = config.profiling, engine.device
    if profiling.memory:
        from dmoe.observe.memory import MemoryWatch

        yield MemoryWatch(profiling, run_dir, device, engine.parts, optimizer, **_memory_context(config, engine))
    if profiling.trace:
        from dmoe.observe.trace import StepTrace

        yield StepTrace(profiling, run_dir, device)
    if profiling.timeline:  # the last, so that the work of the other tools is in no step
        from dmoe.observe.timeline import StepTimeline

        yield StepTimeline(profiling, run_dir, device, engine.parts)


def _memory_context(config: RunConfig, engine: Engine) -> dict[str, Any]:
    """How wide logits are here, and on the first rank a dry run of this run to compare with."""
    from dmoe.checkpoint import ranks
    from dmoe.train.estimate import BackgroundEstimate
    from dmoe.train.plan import logits_width

    width = logits_width(config.model.vocab_size, engine.mesh)
    estimate = BackgroundEstimate(config, ranks.size(), engine.device) if ranks.rank() == 0 else None
    return {"logits_width": width, "estimate": estimate}


def _ignore(error: BaseException) -> None:
    """A tool that has nothing to say about errors."""
