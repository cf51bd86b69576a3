"""The rule that names a rank which keeps the others waiting.

Ranks that meet in collectives all take the same time for a step, so a slow rank is not the one whose step is long. It
is the one that is busy while the others wait for it: its time is its own work, theirs is partly a wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

MIN_STEPS = 3
"""Late in fewer steps is chance."""
MIN_SECONDS = 0.005
"""Behind by less is noise of the host."""
MIN_SHARE = 0.1
"""Of its step, that a late rank is behind."""
MIN_SHARE_OF_STEPS = 2 / 3
"""Of the steps looked at, in which a straggler is late."""


@dataclass(frozen=True)
class Late:
    """Steps in which one rank was late. They are in order, with the seconds behind in each."""

    rank: int
    """Its place among the ranks looked at."""
    region: str
    """Where it loses most of that time."""
    seconds_behind: dict[int, float]


def find_stragglers(steps: list[int], seconds_RN: Array, busy_RN: dict[str, Array]) -> list[Late]:
    """Ranks that kept the others waiting in most of N steps; none among fewer than two ranks or three steps.

    A rank is behind by the time that it was busy minus the median over the other ranks. It is late in a step when that
    is over `MIN_SECONDS` and over `MIN_SHARE` of the step.

    Args:
        seconds_RN: [R ranks, N steps] length of each step.
        busy_RN: the same shape for each region: its time without waits for other ranks.
    """
    num_ranks, num_steps = seconds_RN.shape
    if num_ranks < 2 or num_steps < MIN_STEPS:
        return []
    behind_RN = _beyond_the_others(np.sum(list(busy_RN.values()), axis=0))
    late_RN = behind_RN > np.maximum(MIN_SECONDS, MIN_SHARE * seconds_RN)
    enough = max(MIN_STEPS, MIN_SHARE_OF_STEPS * num_steps)
    found = []
    for rank in range(num_ranks):
        late_N = late_RN[rank]
        if late_N.sum() >= enough:
            losses = {name: _beyond_the_others(part)[rank, late_N].mean() for name, part in busy_RN.items()}
            where = np.flatnonzero(late_N)
            seconds = {steps[i]: float(behind_RN[rank, i]) for i in where}
            found.append(Late(rank, max(losses, key=losses.__getitem__), seconds))
    return found


def _beyond_the_others(values_RN: Array) -> Array:
    """Each rank's value minus the median of the other ranks'."""
    return np.stack([row - np.median(np.delete(values_RN, r, axis=0), axis=0) for r, row in enumerate(values_RN)])
