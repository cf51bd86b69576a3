"""`account_of`: what a `MemoryTimeline` saw of a step, summed up by category, phase and time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmoe.observe.memory.accounting import MemoryTimeline, Storage
from dmoe.observe.memory.categories import (
    ACTIVATIONS,
    BACKWARD,
    CATEGORIES,
    FORWARD,
    GRADIENTS,
    OPTIMIZER,
    PHASES,
    TEMPORARY,
    UPDATE,
    WEIGHTS,
)  # fmt: skip
from dmoe.ops.regions import listening

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Curve:
    """Memory over the time of a step; the largest moment of each of its stretches."""

    seconds: list[float]
    categories: dict[str, list[int]]
    """Bytes at each of those times."""
    phases: list[tuple[float, str]]
    """(seconds, phase that begins there)."""

    @property
    def totals(self) -> list[int]:
        """Bytes at each time."""
        return [sum(sizes) for sizes in zip(*self.categories.values())]


@dataclass(frozen=True)
class Account:
    """The memory of one step, in bytes."""

    categories: dict[str, int]
    """At the moment when most is used; they add up to `peak_bytes`."""
    phases: dict[str, dict[str, int]]
    """The same at the largest moment within each phase."""
    largest: dict[str, int]
    """The most of each category at any time; of different moments, so not a sum."""
    curve: Curve

    @property
    def peak_bytes(self) -> int:
        return sum(self.categories.values())


@contextlib.contextmanager
def following_step(
    timeline: MemoryTimeline, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Around one training step: tell `timeline` what the weights, the gradients and the optimiser's state are."""

    def label_known() -> None:
        timeline.label(parameters, WEIGHTS)
        states = (value for state in optimizer.state.values() for value in state.values())
        timeline.label((t for t in states if isinstance(t, Tensor)), OPTIMIZER)

    label_known()
    timeline.start()
    with listening(_GradientLabels(timeline, parameters)):
        yield
    label_known()  # the first step makes the state


class _GradientLabels:
    """Gradients are whole when the ranks agree on their norm, and gone at the end of the step."""

    def __init__(self, timeline: MemoryTimeline, parameters: Sequence[Tensor]) -> None:
        self._timeline, self._parameters = timeline, parameters

    def enter(self, name: str) -> None:
        if name == "sync":
            self._timeline.label((p.grad for p in self._parameters if p.grad is not None), GRADIENTS)

    def leave(self, name: str) -> None:
        pass


def account_of(timeline: MemoryTimeline, *, points: int = 500) -> Account:
    """Sum up what `timeline` saw since its `start`, with a curve of at most `points` points."""
    starts, names = _phases(timeline)
    storages = [s for s in timeline.storages if s.num_bytes]
    categories = [_final_category(s, starts, names) for s in storages]
    times, levels_NC = _levels(storages, categories, timeline.began)
    totals = levels_NC.sum(1)
    where = np.array(names)[np.searchsorted(starts, times, "right") - 1]
    peaks = {phase: _largest_where(totals, where == phase) for phase in PHASES}
    return Account(
        categories=_by_name(levels_NC[int(totals.argmax())]),
        phases={phase: _by_name(levels_NC[i]) if i is not None else _by_name([]) for phase, i in peaks.items()},
        largest=_by_name(levels_NC.max(0)),
        curve=_curve(timeline, times, levels_NC, list(zip(starts.tolist(), names)), points),
    )


def _phases(timeline: MemoryTimeline) -> tuple[Ints, list[str]]:
    """When each stretch of one phase begins, and which it is."""
    changes = list(timeline.phases)
    if changes[-1][1] == FORWARD and any(phase == BACKWARD for _, phase in changes):
        changes[-1] = (changes[-1][0], UPDATE)
    return np.array([start for start, _ in changes]), [phase for _, phase in changes]


def _final_category(storage: Storage, starts: Ints, names: list[str]) -> str:
    """A tensor of a forward pass that dies in it, or made after the backward, was no activation."""
    if storage.category != ACTIVATIONS:
        return storage.category
    born, died = np.searchsorted(starts, [storage.birth, storage.death], "right") - 1
    stays = names[max(int(born), 0)] == FORWARD and (died > born or storage.death > 2**62)
    return ACTIVATIONS if stays else TEMPORARY


def _levels(storages: list[Storage], categories: list[str], began: int) -> tuple[Ints, Ints]:
    """Times at which something changed, and the bytes of each category from then on [N, C]; the first is `began`."""
    column = {category: i for i, category in enumerate(CATEGORIES)}
    changes: list[tuple[int, int, int]] = []
    for storage, category in zip(storages, categories):
        changes.append((max(storage.birth, began), storage.num_bytes, column[category]))
        if storage.death < 2**62:
            changes.append((max(storage.death, began), -storage.num_bytes, column[category]))
    changes.sort(key=lambda change: change[0])
    times, index = np.unique([began, *(t for t, _, _ in changes)], return_inverse=True)
    deltas_NC = np.zeros((len(times), len(CATEGORIES)), dtype=np.int64)
    _, sizes, columns = np.array(changes, dtype=np.int64).reshape(-1, 3).T
    np.add.at(deltas_NC, (index[1:], columns), sizes)
    return times, deltas_NC.cumsum(0)


def _largest_where(totals: Ints, mask: Any) -> int | None:
    return int(np.where(mask, totals, -1).argmax()) if mask.any() else None


def _by_name(sizes: Any) -> dict[str, int]:
    return dict.fromkeys(CATEGORIES, 0) | {c: int(n) for c, n in zip(CATEGORIES, sizes)}


def _curve(
    timeline: MemoryTimeline, times: Ints, levels_NC: Ints, changes: list[tuple[int, str]], points: int
) -> Curve:
    clocks, moments = (np.array(column) for column in zip(*timeline.seconds))

    def seconds(clock: Any) -> Any:
        return np.interp(clock, clocks, moments - moments[0])

    totals = levels_NC.sum(1)
    edges = np.linspace(0, len(times), min(points, len(times)) + 1).astype(int)
    kept = [start + int(totals[start:end].argmax()) for start, end in pairwise(edges)]
    used = {c: levels_NC[kept, i].tolist() for i, c in enumerate(CATEGORIES) if levels_NC[:, i].any()}
    rounded = [round(float(s), 6) for s in seconds(times[kept])]
    return Curve(rounded, used, [(round(float(seconds(start)), 6), phase) for start, phase in changes])
