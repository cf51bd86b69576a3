"""`MemoryWatch`: accounts for the memory of some training steps, writes it down, and explains when memory runs out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from dmoe.config import ProfilingConfig
from dmoe.errors import RunError
from dmoe.observe.files import write_json, write_text
from dmoe.observe.memory import failure
from dmoe.observe.memory.account import account_of, following_step
from dmoe.observe.memory.accounting import MemoryTimeline, Storage
from dmoe.observe.memory.categories import GRADIENTS, OPTIMIZER, UNACCOUNTED, WEIGHTS
from dmoe.observe.memory.cuda_history import CudaHistory, blocks
from dmoe.observe.memory.failure_kinds import is_out_of_memory
from dmoe.observe.memory.operators import operators_to_look_into
from dmoe.observe.memory.table import render

_FIRST_ACCOUNT = 3
"""Of the steps of this process, if there is only one: by then everything that is made at first use is there."""


class Estimate(Protocol):
    """What a dry run says of each rank, found in the background."""

    def result(self) -> list[dict[str, int]] | None:
        """Bytes by category at the peak of each rank; waits. None if it failed, with a warning."""

    def cancel(self) -> None:
        """It is not wanted any more."""


class MemoryWatch:
    """A tool of a run (`dmoe.train.observers`), on every rank. Files: RUN/profiling/memory/.

    The first step of the process is followed as well, so that running out of memory in it can be explained. Steps that
    are neither that nor accounted for cost nothing. On CUDA an account begins the peak of the allocator anew.

    Args:
        parts: the model of this rank.
        logits_width: columns of the logits on this rank, by which they are known; 0 if there are none.
        estimate: on rank 0, the estimate to compare with.
    """

    def __init__(
        self, profiling: ProfilingConfig, run_dir: Path, device: torch.device, parts: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer, *, logits_width: int = 0, estimate: Estimate | None = None,
    ) -> None:  # fmt: skip
        self._every, self._folder = profiling.memory_every, run_dir / "profiling" / "memory"
        self._device, self._optimizer, self._logits_width = device, optimizer, logits_width
        self._parameters = [p for part in parts for p in part.parameters()]
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._estimate, self._summary = estimate, {}  # type: tuple[Estimate | None, dict[str, Any]]
        self._steps = self._step = 0
        self._timeline: MemoryTimeline | None = None
        self._active = contextlib.ExitStack()
        self._history = CudaHistory(device) if device.type == "cuda" else None
        self._sees_operators = not any(_is_compiled(m) for part in parts for m in part.modules())
        if not self._sees_operators and self._rank == 0:
            warnings.warn(
                "profiling.memory with train.compile: operators inside of compiled code are not seen; memory is taken "
                "from the allocator alone, without activations by category",
                stacklevel=2,
            )

    def begin(self, step: int) -> None:
        """Before step `step`."""
        self._steps, self._step = self._steps + 1, step
        accounted = self._is_accounted
        if accounted and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._sees_operators and (accounted or self._steps == 1):
            self._timeline = MemoryTimeline(
                device=self._device.type, logits_width=self._logits_width, stacks=True,
                expand=operators_to_look_into(self._device), rounding=512 if self._device.type == "cuda" else 1,
            )  # fmt: skip
            self._active.enter_context(self._timeline)
            self._active.enter_context(following_step(self._timeline, self._parameters, self._optimizer))

    def end(self, step: int) -> None:
        """After it. Collective after a step that is accounted for."""
        self._active.close()
        timeline, self._timeline = self._timeline, None
        if not self._is_accounted:
            return
        mine = self._allocator_only() if timeline is None else _of_account(timeline)
        mine = {"rank": self._rank, **mine, **self._outside_measures(mine)}
        if self._history is not None:
            self._history.save(self._folder / f"rank{self._rank}_step{step}.pickle")
        ranks: list[Any] = [mine]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        if self._rank == 0:
            most = max(ranks, key=lambda r: r["peak_bytes"])
            for rank in ranks:
                if rank is not most:
                    rank.pop("areas", None)  # one is drawn
            self._summary = {"step": step, "device": _name(self._device), "ranks": ranks, "estimate": None}
            write_json(self._folder / "summary.json", self._summary)

    def failed(self, error: BaseException) -> None:
        """The step failed with `error`. RunError in its place if memory ran out."""
        self._active.close()
        if self._estimate is not None:
            self._estimate.cancel()
            self._estimate = None
        if not is_out_of_memory(error):
            return
        if self._history is not None:
            self._history.save_failure(self._folder / f"oom_rank{self._rank}.pickle")
        message = failure.write_report(self._folder, self._rank, self._step, error, self._alive())
        raise RunError(message) from error

    def close(self) -> None:
        """Wait for the estimate, compare, print and draw."""
        self._active.close()
        if self._history is not None:
            self._history.stop()
        estimate, self._estimate = self._estimate, None
        if not self._summary:
            if estimate is not None:
                estimate.cancel()
            return
        found = estimate.result() if estimate is not None else None
        if found is not None:
            for rank, categories in zip(self._summary["ranks"], found):
                rank["estimate"] = categories
            first = self._summary["ranks"][0]["estimate"]
            self._summary["estimate"] = {"peak_bytes": sum(first.values()), "categories": first}
            write_json(self._folder / "summary.json", self._summary)
        table = render(self._summary)
        write_text(self._folder / "memory.txt", table + "\n")
        print(table, flush=True)
        from dmoe.observe.memory.picture import save_pictures

        save_pictures(self._folder, self._summary)

    @property
    def _is_accounted(self) -> bool:
        return self._steps % self._every == 0 if self._every else self._steps == _FIRST_ACCOUNT

    def _outside_measures(self, mine: dict[str, Any]) -> dict[str, Any]:
        """What the system says: on CUDA the allocator's peak, of which the account lacks a part; resident memory."""
        if self._device.type != "cuda":
            return resident_memory()
        torch.cuda.synchronize(self._device)
        peak = max(torch.cuda.max_memory_allocated(self._device), mine["peak_bytes"])
        categories = mine["categories"] | {UNACCOUNTED: peak - mine["peak_bytes"]}
        reserved = torch.cuda.max_memory_reserved(self._device)
        return {"peak_bytes": peak, "categories": categories, "reserved_bytes": reserved}

    def _allocator_only(self) -> dict[str, Any]:
        sizes = dict.fromkeys((WEIGHTS, GRADIENTS, OPTIMIZER), 0)
        for tensor, category in failure.known_tensors(self._parameters, self._optimizer):
            sizes[category] += tensor.nbytes
        sizes[GRADIENTS] = sizes[WEIGHTS]  # gone by now
        return {"peak_bytes": sum(sizes.values()), "categories": sizes, "phases": {}, "curve": []}

    def _alive(self) -> list[Storage]:
        """What lived when memory ran out, as well as it is known."""
        if self._timeline is not None:
            return self._timeline.at_failure or self._timeline.alive()
        known = list(failure.known_tensors(self._parameters, self._optimizer))
        if self._history is not None and self._history.at_failure is not None:
            return list(blocks(self._history.at_failure, {t.data_ptr(): category for t, category in known}))
        return failure.reachable(known, self._device.type)


def _of_account(timeline: MemoryTimeline) -> dict[str, Any]:
    account = account_of(timeline)
    curve = account.curve
    return {
        "peak_bytes": account.peak_bytes, "categories": account.categories, "phases": account.phases,
        "curve": [list(point) for point in zip(curve.seconds, curve.totals)], "areas": curve.categories,
        "phase_starts": [list(start) for start in curve.phases],
    }  # fmt: skip


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def resident_memory() -> dict[str, int]:
    """ "rss_bytes" of this process now, and "rss_peak_bytes" so far; empty where the system does not say."""
    names = {"VmRSS": "rss_bytes", "VmHWM": "rss_peak_bytes"}
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in names:
                found[names[name]] = int(rest.split()[0]) * 1024
    return found
