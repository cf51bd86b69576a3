"""Several implementations of one layer, timed side by side: first calls, memory, interleaved rounds, decoding.

Whatever one of them does wrong ends up in its `Outcome` and does not keep the others from being measured.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmoe.bench.inputs import Inputs
from dmoe.bench.measure import TOO_LONG, Clock, attempt, peak_bytes, saved_bytes

KINDS = ("forward", "forward_backward")


def _same(gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    gate_up, down = gradients
    return gate_up, down


@dataclass
class Contestant:
    """An implementation over its own weights: `call(x_TD, ids_TK, weights_TK)` gives y_TD, autograd the gradients."""

    name: str
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    leaves: Sequence[Tensor]
    """The weights that `call` uses and whose gradients a step computes."""
    weight_gradients: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]] = _same
    """Turns the gradients of `leaves` into those of gate_up_proj and down_proj."""

    def forward(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return self.call(*inputs[:3])

    def forward_backward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Gradients of x, the routing weights and the leaves, which nobody keeps: each step allocates them anew."""
        leaves = [inputs.x_TD, inputs.weights_TK, *self.leaves]
        return torch.autograd.grad(self.call(*inputs[:3]), leaves, inputs.grad_TD, allow_unused=True)


@dataclass
class Limit:
    """A contestant without autograd: two functions of nothing."""

    name: str
    run_forward: Callable[[], Any]
    run_forward_backward: Callable[[], Any]

    def forward(self, _inputs: Inputs) -> None:
        self.run_forward()

    def forward_backward(self, _inputs: Inputs) -> None:
        self.run_forward_backward()


@dataclass
class Outcome:
    """What was measured of one implementation, and for what was not, why."""

    first_call: float = 0.0
    """Seconds of the first forward and the first step together, compilation and tuning included."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    saved_bytes: int | None = None
    peak_bytes: int | None = None

    def median(self, kind: str) -> float | None:
        return statistics.median(self.seconds[kind]) if self.seconds.get(kind) else None


class OutOfTime(Exception):
    """The command's time is up."""


@dataclass
class Deadline:
    """When to stop, in seconds of `time.monotonic`; and how long a first call may take."""

    end: float | None = None
    first_call: float | None = None

    def check(self) -> None:
        if self.end is not None and time.monotonic() > self.end:
            raise OutOfTime

    def for_first_call(self) -> float | None:
        limits = [self.first_call, None if self.end is None else max(0.1, self.end - time.monotonic())]
        return min((limit for limit in limits if limit is not None), default=None)


Contestants = Sequence[Contestant | Limit]


def first_calls(
    contestants: Contestants, inputs: Inputs, kinds: Sequence[str], outcomes: dict[str, Outcome], deadline: Deadline
) -> None:
    """Call each implementation once a kind: compilation and tuning happen here."""
    for contestant in contestants:
        outcome = outcomes[contestant.name]
        for kind in kinds:
            deadline.check()
            start = time.perf_counter()
            run = partial(_finish, getattr(contestant, kind), inputs)
            _, problem = attempt(run, deadline.for_first_call())
            outcome.first_call += time.perf_counter() - start
            if problem:
                deadline.check()
                outcome.problems[kind] = problem
            if problem and TOO_LONG in problem:  # the next kind would take as long
                outcome.problems |= dict.fromkeys(kinds, problem)
                break


def _finish(run: Callable[[Inputs], Any], inputs: Inputs) -> None:
    run(inputs)
    if inputs.x_TD.is_cuda:
        torch.cuda.synchronize()


def measure_memory(contestants: Contestants, inputs: Inputs, outcomes: dict[str, Outcome], deadline: Deadline) -> None:
    """Bytes held from forward to backward beside x, weights, routing and output, and the peak of one step."""
    for contestant in contestants:
        outcome = outcomes[contestant.name]
        if not isinstance(contestant, Contestant) or "forward_backward" in outcome.problems:
            continue
        deadline.check()
        known = [*inputs, *contestant.leaves]
        outcome.saved_bytes, problem = attempt(partial(saved_bytes, partial(contestant.call, *inputs[:3]), known))
        if not problem:
            step = partial(contestant.forward_backward, inputs)
            outcome.peak_bytes, problem = attempt(partial(peak_bytes, step, inputs.x_TD.device))
        if problem:
            outcome.problems["memory"] = problem


def run_rounds(
    contestants: Contestants, inputs: Sequence[Inputs], kinds: Sequence[str], outcomes: dict[str, Outcome],
    clock: Clock, deadline: Deadline, *, rounds: int, order: random.Random,
) -> None:  # fmt: skip
    """Time every kind of every implementation once a round, in random order, on the next of the input sets.

    Interleaved, so that a slow moment or a hot card falls on all of them. The first rounds, one for each input set,
    are not counted. What fails in a round is not tried again.
    """
    for number in range(rounds + len(inputs)):
        batch = inputs[number % len(inputs)]
        for contestant in order.sample(list(contestants), len(contestants)):
            outcome = outcomes[contestant.name]
            for kind in kinds:
                if kind in outcome.problems:
                    continue
                deadline.check()
                taken, problem = attempt(partial(clock.seconds, partial(getattr(contestant, kind), batch)))
                if problem:
                    outcome.problems[kind] = problem
                elif number >= len(inputs):
                    outcome.seconds.setdefault(kind, []).append(taken)


class Replay:
    """A forward captured in a CUDA graph; on a CPU, the forward itself."""

    def __init__(self, contestant: Contestant, example: Inputs) -> None:
        self._inputs = Inputs(*(t.detach().clone() for t in example))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._contestant = contestant
        if not example.x_TD.is_cuda:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as capturing asks for: no first call inside the graph
            for _ in range(3):
                contestant.forward(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        # A synchronisation during capture would leave the allocator in a bad state: look for one before.
        torch.cuda.set_sync_debug_mode("error")
        try:
            contestant.forward(self._inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = contestant.forward(self._inputs)

    def load(self, batch: Inputs) -> None:
        for mine, other in zip(self._inputs, batch):
            mine.copy_(other.detach())

    def __call__(self) -> None:
        if self._graph is None:
            self._contestant.forward(self._inputs)
        else:
            self._graph.replay()


def run_decode(
    contestants: Sequence[Contestant], inputs: Sequence[Inputs], outcomes: dict[str, Outcome],
    clock: Clock, deadline: Deadline, *, rounds: int, order: random.Random,
) -> None:  # fmt: skip
    """Time graphed forwards; the kind in `outcomes` is "decode T"."""
    kind = f"decode {inputs[0].x_TD.shape[0]}"
    replays: list[tuple[str, Replay]] = []
    for contestant in contestants:
        deadline.check()
        replay, problem = attempt(partial(Replay, contestant, inputs[0]), deadline.for_first_call())
        if problem:
            outcomes[contestant.name].problems[kind] = problem
        else:
            replays.append((contestant.name, replay))
    for number in range(rounds + 1):
        for name, replay in order.sample(replays, len(replays)):
            if kind in outcomes[name].problems:
                continue
            deadline.check()
            replay.load(inputs[number % len(inputs)])
            taken, problem = attempt(partial(clock.seconds, replay))
            if problem:
                outcomes[name].problems[kind] = problem
            elif number:
                outcomes[name].seconds.setdefault(kind, []).append(taken)
