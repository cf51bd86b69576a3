"""Why a step was not finite: the same batch once more with eyes open, and a sentence that names rank and module."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dmoe.checkpoint import ranks
from dmoe.config import SPLIT_BACKWARD_SCHEDULES, ProfilingConfig
from dmoe.parallel.grad_norm import local_gradients
from dmoe.train.engine import Batch, Engine
from dmoe.train.nonfinite_trace import Event, Trace, bad_parameters

# Each costs a slow step, and later ones seldom tell more.
_MAX_EXPLAINED = 3
_MAX_LINES = 4


@dataclass(frozen=True)
class _Seen:
    """What one rank saw."""

    weights: list[str]
    event: Event | None
    gradients: list[str]
    loss: float
    largest_output: float
    largest_gradient: float


class NonFiniteExplainer:
    """Explains the first few steps of this process that were not finite. Every rank calls the same.

        explainer.remember(); result = training_step(...)
        if not result.finite: explainer.explain(batch, write_line)

    The weights are those of the step, which was skipped. Random numbers are those of the step too. Gradients, load
    statistics, balancing and the state of the generators are left as they were.
    """

    def __init__(self, engine: Engine, profiling: ProfilingConfig) -> None:
        self._engine = engine
        self._left = _MAX_EXPLAINED if profiling.explain_non_finite else 0
        self._random: list[torch.Tensor] | None = None

    def remember(self) -> None:
        """Before a step: the state of the random generators."""
        if self._left:
            self._random = _random_state(self._engine.device)

    def explain(self, batch: Batch, write: Callable[[str], object]) -> None:
        """Run the batch again and pass each sentence to `write`, on every rank the same. Collective."""
        if not self._left:
            return
        self._left -= 1
        seen: list[Any] = ranks.gather(self._look(batch))
        for line in sentences(seen)[:_MAX_LINES]:
            write(line)

    def _look(self, batch: Batch) -> _Seen:
        engine, mesh = self._engine, self._engine.mesh
        pp = 1 if mesh is None else mesh.config.pp
        split = mesh is not None and pp > 1 and mesh.config.schedule in SPLIT_BACKWARD_SCHEDULES
        trace = Trace(engine.parts, backward=not split)
        weights = [phrase for part in engine.parts for phrase in bad_parameters(part)]
        with _as_before(engine, self._random), trace.watching():
            loss = float(engine.forward_backward(batch))
            pairs = local_gradients(engine.parameters)
            gradients = [phrase for part in engine.parts for phrase in bad_parameters(part, gradients=True)]
            largest = max((float(gradient.abs().amax()) for _, gradient in pairs if gradient.numel()), default=0.0)
        return _Seen(weights, trace.first, gradients, loss, trace.largest_output, largest)


def sentences(seen: list[_Seen]) -> list[str]:
    """What the ranks saw, in the order of the ranks, as sentences; the place where it began first."""
    lines = [line for line in [_beginning(seen)] if line]
    lines += _by_ranks({rank: "; ".join(s.weights[:3]) for rank, s in enumerate(seen) if s.weights})
    bad_loss = {rank: s.loss for rank, s in enumerate(seen) if not math.isfinite(s.loss)}
    if not lines and bad_loss:
        largest = max(s.largest_output for s in seen)
        lines.append(
            f"{_ranks(sorted(bad_loss))}: the loss is {next(iter(bad_loss.values()))}, the outputs of all modules are "
            f"finite, the largest {largest:.3g}"
        )
    if not any(s.event for s in seen):
        only = "" if lines else ", all that passes between modules is finite"
        lines += [
            line + only
            for line in _by_ranks({r: "; ".join(s.gradients[:3]) for r, s in enumerate(seen) if s.gradients})
        ]
    if not lines:
        largest = max(s.largest_gradient for s in seen)
        lines.append(
            "everything is finite when the same batch runs again: a sum over ranks or of squares that overflowed (the "
            f"largest gradient is {largest:.3g}), or an operation that does not always give the same"
        )
    if len(seen) == 1:
        lines = [line.removeprefix("rank 0: ") for line in lines]
    return [f"not finite: {line}" for line in lines]


def _beginning(seen: list[_Seen]) -> str | None:
    """The first place of all: forward before backward, then by stage, then by the order of the modules."""
    events = {rank: s.event for rank, s in enumerate(seen) if s.event is not None}
    own = {rank: event for rank, event in events.items() if not event.received} or events
    if not own:
        return None

    def order(event: Event) -> tuple[bool, int, int]:
        return event.backward, -event.stage if event.backward else event.stage, event.position

    first = min(map(order, own.values()))
    begun = {rank: event.text for rank, event in own.items() if order(event) == first}
    line = "; ".join(_by_ranks(begun))
    if not first[0] and not any(s.weights for s in seen):
        line += " and so are all weights"
    others = [rank for rank in events if rank not in begun]
    return line + (f"; later also on {_ranks(others)}" if others else "")


def _by_ranks(texts: dict[int, str]) -> list[str]:
    """A line for each text, after the ranks that have it."""
    of_text: dict[str, list[int]] = {}
    for rank, text in texts.items():
        of_text.setdefault(text, []).append(rank)
    return [f"{_ranks(members)}: {text}" for text, members in of_text.items()]


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {shown}"


@contextlib.contextmanager
def _as_before(engine: Engine, random: list[torch.Tensor] | None) -> Iterator[None]:
    """Run as the step did and leave nothing behind."""
    now = _random_state(engine.device)
    for recorder in engine.recorders:  # the step is in the statistics already
        recorder.update = lambda: None  # type: ignore[method-assign]
    try:
        if random is not None:
            _set_random_state(engine.device, random)
        yield
    finally:
        for recorder in engine.recorders:
            del recorder.update
        _set_random_state(engine.device, now)
        for parameter in engine.parameters:
            parameter.grad = None
        engine.balancer.discard()


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
