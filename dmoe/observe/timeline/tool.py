"""`StepTimeline`: the timeline as a tool of a run."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from dmoe.config.profiling import ProfilingConfig
from dmoe.observe.files import write_json
from dmoe.observe.timeline.marks import Marks, router_backward_marked
from dmoe.observe.timeline.parts import Span, coarse, split_step
from dmoe.observe.timeline.summary import WINDOW, Stragglers, read_ranks, summarize
from dmoe.observe.timeline.waits import hearing_waits
from dmoe.ops.regions import listening

FOLDER = Path("profiling") / "timeline"
KEPT_STEPS = 500
"""The last steps of a process, which the summary is about."""
SHOWN_STEPS = 8
"""Of those, the last ones that a picture can be drawn of."""
PATIENCE = 5.0
"""Seconds that rank 0 waits at the end for the files of the other ranks. One that died writes none."""


class _Step(NamedTuple):
    """Seconds of a step, and by region; see `StepParts`."""

    number: int
    seconds: float
    regions: dict[str, float]
    waiting: dict[str, float]
    host_regions: dict[str, float]
    """On a GPU, by the clock of the host."""


class StepTimeline:
    """Times the regions of each step on each rank, and names ranks that keep the others waiting.

    Writes `RUN/profiling/timeline/rank{r}.json` every `WINDOW` steps and at the end, and on rank 0 `summary.json` and
    the pictures `timeline.svg` and `timeline.png`; see `summary.py`. The ranks send each other nothing: rank 0 reads
    the files of the others, so the run directory has to be one that all machines share. Nothing waits for a GPU: the
    times of a step are read when the next one has ended.

    Args:
        parts: the model of this rank, whose routers' backward is marked.
    """

    def __init__(
        self, _profiling: ProfilingConfig, run_dir: Path, device: torch.device, parts: Sequence[nn.Module] = ()
    ) -> None:
        self.folder, self.device = run_dir / FOLDER, device
        here = dist.is_available() and dist.is_initialized()
        self.rank, self.num_ranks = (dist.get_rank(), dist.get_world_size()) if here else (0, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / f"rank{self.rank}.json"
        self._path.unlink(missing_ok=True)  # of an earlier process, which rank 0 would take for this one's
        self._steps: deque[_Step] = deque(maxlen=KEPT_STEPS)
        self._spans: deque[tuple[int, list[Span]]] = deque(maxlen=SHOWN_STEPS)
        self._first = 0
        self._marks: Marks | None = None
        self._pending: deque[tuple[int, Marks]] = deque()
        self._pool: list[torch.cuda.Event] = []
        self._in_step, self._until_close = contextlib.ExitStack(), contextlib.ExitStack()
        self._stragglers = Stragglers()
        for part in parts:
            self._until_close.enter_context(router_backward_marked(part, self))

    def begin(self, step: int) -> None:
        if not self._first:
            self._first = step
            self._until_close.enter_context(hearing_waits(self, self._hears_wait))
        self._marks = Marks(self.device, self._pool)
        self._in_step.enter_context(listening(self._marks))

    def end(self, step: int) -> None:
        assert self._marks is not None
        self._marks.close()
        self._in_step.close()
        self._pending.append((step, self._marks))
        self._marks = None
        self._read_done_steps()
        if (step - self._first + 1) % WINDOW == 0:
            self._write_own()
            if self.rank == 0:
                self._summarize()

    def close(self) -> None:
        """Write what there is, also of a run that failed: steps that did not end are left out."""
        self._in_step.close()
        self._until_close.close()
        with contextlib.suppress(RuntimeError):  # of a device that failed
            self._read_done_steps()
        if not self._steps:
            return
        self._write_own(closed=True)
        if self.rank == 0:
            self._wait_for_the_others()
            self._summarize(draw=True)

    def enter(self, name: str) -> None:
        """What is heard all the time goes to the step that runs, if any."""
        if self._marks is not None:
            self._marks.enter(name)

    def leave(self, name: str) -> None:
        if self._marks is not None:
            self._marks.leave(name)

    def _hears_wait(self) -> bool:
        return self._marks is not None and self._marks.is_of_step()

    def _read_done_steps(self) -> None:
        """Times of the steps that the device has finished."""
        while self._pending and self._pending[0][1].is_done():
            step, marks = self._pending.popleft()
            device_times = marks.device_times()
            parts = split_step(marks.marks, marks.host_times if device_times is None else device_times)
            host = {} if device_times is None else split_step(marks.marks, marks.host_times).regions
            marks.release()
            self._steps.append(_Step(step, parts.seconds, parts.regions, parts.waiting, host))
            self._spans.append((step, parts.spans))

    def _write_own(self, closed: bool = False) -> None:
        steps = list(self._steps)
        content: dict[str, Any] = {
            "rank": self.rank,
            "device": str(self.device),
            "first": self._first,
            "closed": closed,
            "steps": [step.number for step in steps],
            "seconds": [_rounded(step.seconds) for step in steps],
            "regions": _columns([step.regions for step in steps]),
            "waiting": _columns([step.waiting for step in steps]),
            "spans": {
                step: [[s.region, s.waiting, _rounded(s.start), _rounded(s.end)] for s in coarse(spans)]
                for step, spans in self._spans
            },
        }
        if self.device.type == "cuda":
            content["host_regions"] = _columns([step.host_regions for step in steps])
        write_json(self._path, content)

    def _summarize(self, draw: bool = False) -> None:
        files = read_ranks(self.folder, range(self.num_ranks))
        for found in self._stragglers.look(files):
            print(
                f"timeline: rank {found['rank']} keeps the other ranks waiting, {1e3 * found['seconds_behind']:.0f} ms "
                f"of a step, in {found['region']!r}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        summary = summarize(files, self._stragglers.entries(), self.num_ranks)
        if summary is None:
            return
        write_json(self.folder / "summary.json", summary)
        if draw:
            from dmoe.observe.timeline.picture import draw_timeline

            draw_timeline(self.folder, summary, files)

    def _wait_for_the_others(self) -> None:
        """Until all have written their last file, or are late with it."""
        deadline, open_ranks = time.monotonic() + PATIENCE, set(range(self.num_ranks))
        while open_ranks and time.monotonic() < deadline:
            open_ranks -= {file.rank for file in read_ranks(self.folder, open_ranks) if file.content["closed"]}
            time.sleep(0.05 if open_ranks else 0)


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_rounded(row.get(name, 0.0)) for row in rows] for name in names}


def _rounded(seconds: float) -> float:
    return round(seconds, 7)
