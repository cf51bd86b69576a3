"""Marks of a step to seconds: the time of each region without what is nested in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dmoe.observe.timeline.marks import WAITING, Mark

OTHER = "other"
"""What lies in no region."""
_PIECES = 400


class Span(NamedTuple):
    """A piece of a step that belongs to one region; in seconds from the step's begin."""

    region: str
    waiting: bool
    start: float
    end: float


@dataclass(frozen=True)
class StepParts:
    """Where one rank's step went, in seconds. The regions add up to `seconds`."""

    seconds: float
    regions: dict[str, float]
    """Without nested regions, with the waits inside."""
    waiting: dict[str, float]
    """Of that the waits for collectives."""
    spans: list[Span]
    """The whole step, one after the other."""


def split_step(marks: Sequence[Mark], times: Sequence[float]) -> StepParts:
    """Divide the time from the first to the last mark among the regions that were innermost in it.

    A region left with others still open in it closes those too, as an exception does.
    """
    open_names: list[str] = []
    spans: list[Span] = []
    regions: dict[str, float] = {}
    waiting: dict[str, float] = {}
    start = times[0]
    for mark, begin, end in zip(marks, times, times[1:]):
        if mark.begins:
            open_names.append(mark.name)
        elif mark.name in open_names:
            del open_names[len(open_names) - 1 - open_names[::-1].index(mark.name) :]
        names = [name for name in open_names[1:] if name != WAITING]  # the first is the step itself
        region, waits = names[-1] if names else OTHER, open_names[-1:] == [WAITING]
        seconds = max(end - begin, 0.0)
        regions[region] = regions.get(region, 0.0) + seconds
        if waits:
            waiting[region] = waiting.get(region, 0.0) + seconds
        spans.append(Span(region, waits, begin - start, end - start))
    total = times[-1] - start
    return StepParts(total, regions, waiting, spans)


def coarse(spans: list[Span]) -> list[Span]:
    """As fine as a picture can show: each of `_PIECES` equal pieces of a step goes to what fills most of it."""
    total = spans[-1].end
    width = total / _PIECES
    shares: list[dict[tuple[str, bool], float]] = [{} for _ in range(_PIECES)]
    for region, waiting, start, end in spans:
        first, last = (min(int(t / width), _PIECES - 1) if width else 0 for t in (start, end))
        for piece in range(first, last + 1):
            seconds = min(end, (piece + 1) * width) - max(start, piece * width)
            shares[piece][region, waiting] = shares[piece].get((region, waiting), 0.0) + seconds
    result: list[Span] = []
    for piece, share in enumerate(shares):
        kind = max(share, key=share.__getitem__, default=(OTHER, False))
        if result and result[-1][:2] == kind:
            result[-1] = result[-1]._replace(end=(piece + 1) * width)
        else:
            result.append(Span(*kind, piece * width, (piece + 1) * width))
    return result
