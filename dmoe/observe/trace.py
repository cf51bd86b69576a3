"""`StepTrace`: some steps of a run under torch's profiler."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dmoe.config.profiling import ProfilingConfig
from dmoe.observe.files import write_text
from dmoe.ops.regions import listening

FOLDER = Path("profiling") / "trace"
_ROWS = 200  # of a table of operators


class StepTrace:
    """Records steps on every rank, after config section `profiling`: wait, warm up, record, and so on again.

    Writes `RUN/profiling/trace/rank{r}.json.gz`, a Chrome trace (for Perfetto or chrome://tracing) with the regions of
    a step as "dmoe/NAME" and the ranks in "distributedInfo"; and the operators that took most time of the host, in
    `rank{r}_cpu.txt`, and of the GPU, in `rank{r}_device.txt`. From the second recording on the names begin with
    `rank{r}-{n}`, n = 2, 3, ... A recording is in memory until it is written, and the profiler costs nothing before its
    warm-up. A run that ends within a recording writes the steps that it has.
    """

    def __init__(self, profiling: ProfilingConfig, run_dir: Path, device: torch.device) -> None:
        self.profiling, self.folder, self.device = profiling, run_dir / FOLDER, device
        here = dist.is_available() and dist.is_initialized()
        self.rank, self.num_ranks = (dist.get_rank(), dist.get_world_size()) if here else (0, 1)
        self._steps_waited = 0
        self._recordings = 0
        self._profiler: torch.profiler.profile | None = None
        self._hearing = contextlib.ExitStack()

    def begin(self, step: int) -> None:
        repeat = self.profiling.trace_repeat
        if self._profiler is not None or (repeat and self._recordings == repeat):
            return
        if self._steps_waited == self.profiling.trace_wait:
            self._start(step)
        self._steps_waited += 1

    def end(self, _step: int) -> None:
        if self._profiler is None:
            return
        self._profiler.step()
        if self._profiler.step_num == self.profiling.trace_warmup + self.profiling.trace_active:
            self._stop()

    def close(self) -> None:
        """Write what a run that ends has recorded."""
        try:
            self._stop()
        except RuntimeError as error:  # of a device that failed: the run's own error is the one to show
            print(f"trace: not written: {error}", file=sys.stderr, flush=True)

    def _start(self, step: int) -> None:
        # One profiler a recording: it keeps its events as long as it lives.
        profiling, activities = self.profiling, [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=0, warmup=profiling.trace_warmup, active=profiling.trace_active, repeat=1
            ),
            on_trace_ready=self._write,
            with_stack=profiling.trace_stacks,
        )
        self._profiler.start()
        self._profiler.add_metadata_json("dmoe_first_step", json.dumps(step + profiling.trace_warmup))
        if self.num_ranks == 1:  # else the profiler adds it
            self._profiler.add_metadata_json("distributedInfo", json.dumps({"rank": 0, "world_size": 1}))
        self._hearing.enter_context(listening(_Annotations()))

    def _stop(self) -> None:
        self._hearing.close()
        profiler, self._profiler, self._steps_waited = self._profiler, None, 0
        if profiler is not None:
            profiler.stop()  # writes, unless that is done

    def _write(self, profiler: torch.profiler.profile) -> None:
        self._recordings += 1
        name = f"rank{self.rank}" + (f"-{self._recordings}" if self._recordings > 1 else "")
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"{name}.json.gz"
        temporary = trace.with_name(f".{trace.name}")  # the profiler compresses what ends in .gz
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, trace)
        operators = profiler.key_averages()
        self._write_table(operators, f"{name}_cpu.txt", "self_cpu_time_total")
        if self.device.type == "cuda":
            self._write_table(operators, f"{name}_device.txt", "self_device_time_total")
        if self.rank == 0:
            print(f"trace: {trace} (open it in https://ui.perfetto.dev)", file=sys.stderr, flush=True)

    def _write_table(self, operators: Any, name: str, order: str) -> None:
        write_text(self.folder / name, operators.table(sort_by=order, row_limit=_ROWS) + "\n")


class _Annotations:
    """Shows regions in the trace. They nest in each thread, and the threads are heard all at once."""

    def __init__(self) -> None:
        self._open = threading.local()

    def enter(self, name: str) -> None:
        annotation = torch.profiler.record_function(f"dmoe/{name}")
        annotation.__enter__()
        self._of_thread().append(annotation)

    def leave(self, name: str) -> None:
        self._of_thread().pop().__exit__(None, None, None)

    def _of_thread(self) -> list[Any]:
        if not hasattr(self._open, "stack"):
            self._open.stack = []
        stack: list[Any] = self._open.stack
        return stack
