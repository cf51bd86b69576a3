"""What is heard during one step: where regions and waits begin and end, and when."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from dmoe.moe import moe_layers
from dmoe.ops.regions import Listener

WAITING = "waiting"
"""Name of a wait for a collective, among the regions."""


class Mark(NamedTuple):
    """A region or a wait that begins or ends."""

    name: str
    begins: bool


class Marks:
    """Listens to regions (`dmoe.ops.regions.Listener`) and waits, and keeps the times of one step.

    On a GPU a mark is an event on the stream that computes: the seconds between two are those of the device, in which
    it may have had nothing to do. The host never waits for it; `device_times` may be called once it is done.

    Args:
        pool: events to use; more are made when it is empty, which takes longer than recording one.
    """

    def __init__(self, device: torch.device, pool: list[torch.cuda.Event] | None = None) -> None:
        self._pool = [] if pool is None else pool
        self.marks: list[Mark] = []
        self.host_times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._thread = threading.get_ident()
        self.enter("step")

    def enter(self, name: str) -> None:
        self._add(Mark(name, True))

    def leave(self, name: str) -> None:
        self._add(Mark(name, False))

    def close(self) -> None:
        """The end of the step."""
        self.leave("step")

    def is_of_step(self) -> bool:
        """Whether this thread runs a part of the step, and not, say, a checkpoint being saved: it is the one that made
        this object, or runs a backward. And whether it works on the stream that is watched."""
        mine = threading.get_ident() == self._thread or torch._C._current_graph_task_id() != -1
        return mine and (self._stream is None or torch.cuda.current_stream(self._stream.device) == self._stream)

    def is_done(self) -> bool:
        """Whether the device has passed all marks."""
        return not self._events or self._events[-1].query()

    def device_times(self) -> list[float] | None:
        """Seconds of each mark from the first, on a GPU."""
        if self._stream is None:
            return None
        return [self._events[0].elapsed_time(event) / 1e3 for event in self._events]

    def release(self) -> None:
        """Give the events back to the pool."""
        self._pool += self._events
        self._events = []

    def _add(self, mark: Mark) -> None:
        self.marks.append(mark)
        self.host_times.append(time.perf_counter())
        if self._stream is not None:
            self._events.append(self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True))
            self._events[-1].record(self._stream)


@contextlib.contextmanager
def router_backward_marked(part: nn.Module, listener: Listener) -> Iterator[None]:
    """Let `listener` hear the backward of every router of `part`, which autograd runs, as "routing".

    Marked are the nodes that made weights, scores and logits, with the large products among them. What runs between
    these (casts, gathers) stays in "backward".
    """

    def hook(_module: nn.Module, _args: Any, routing: Any) -> None:
        if torch.compiler.is_compiling():
            return
        outputs = (routing.topk_weights_TK, routing.scores_TE, routing.logits_TE)
        for node in {t.grad_fn for t in outputs if t.grad_fn is not None}:
            node.register_prehook(lambda *_: listener.enter("routing"))
            node.register_hook(lambda *_: listener.leave("routing"))

    handles = [layer.router.register_forward_hook(hook) for layer in moe_layers(part).values()]
    yield
    for handle in handles:
        handle.remove()
