"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dmoe.checkpoint import ranks
from dmoe.checkpoint.save import check_request, write_checkpoint
from dmoe.checkpoint.staging import HostCopies, Snapshot


class AsyncSaver:
    """Saves as `save_checkpoint` does, except that `save` returns once the state is copied to CPU memory.

        with AsyncSaver() as saver:
            saver.save(run_dir, step, training_state(model, optimizer))

    One save runs at a time, in a thread, with its collectives on a gloo group of their own. Every rank holds a copy of
    its part of the state in CPU memory, kept for the next save. Making a saver and its methods are collective: all
    ranks call them in the same order. Leave the `with` block, or call `wait`, before destroying the process group. Do
    not call `save_checkpoint` for the same run while a save is under way.
    """

    def __init__(self) -> None:
        self._group = ranks.new_cpu_group()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._copies = HostCopies()
        if self._group is None:
            from dmoe.checkpoint.dcp_io import ignore_single_process_warning

            ignore_single_process_warning()

    def save(self, run_dir: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> None:
        """Copy `state` and start to write it; see `save_checkpoint` for the arguments.

        Waits for an earlier save first, and raises its RunError if it failed; this one is then not begun. Raises
        ConfigError for a bad `keep` or `step` and TypeError for a state that cannot be written, on every rank.
        """
        self.wait()
        check_request(step, keep)
        snapshot = ranks.on_each(lambda: self._copies.take(state), self._group)
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._pending = self._thread.submit(self._write, device, Path(run_dir), step, snapshot, keep)

    def wait(self) -> Path | None:
        """Wait for the save under way and return its path; None if there is none. Raises its RunError, once."""
        if self._pending is None:
            return None
        try:
            return self._pending.result()
        finally:
            if self._pending.done():  # not so after Ctrl-C
                self._pending = None

    def _write(self, device: int | None, run_dir: Path, step: int, snapshot: Snapshot, keep: int) -> Path:
        if device is not None:
            torch.cuda.set_device(device)  # a new thread is on device 0, and DCP makes a stream
        return write_checkpoint(run_dir, step, snapshot, keep=keep, group=self._group)

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            warnings.warn(f"also: {failure}", stacklevel=2)  # what ended the block is the better explanation
        finally:
            self._thread.shutdown()
