"""The history of CUDA's caching allocator: kept while a run is watched, saved in torch's own format, and read."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dmoe.observe.files import write_bytes
from dmoe.observe.memory.accounting import Storage
from dmoe.observe.memory.categories import ACTIVATIONS, EXCHANGE, GATHERED, LOGITS, TEMPORARY, WORKSPACES

_MAX_ENTRIES = 200_000
# Where a block was made, by a part of a file's path or a function's name, tells what it is for; the first hit counts.
_PLACES = (
    ("/distributed/fsdp/", GATHERED),
    ("ops/messages.py", EXCHANGE),
    ("in _token_rows_triton", EXCHANGE),
    ("ops/all_to_all.py", EXCHANGE),
    ("parallel/loss.py", LOGITS),
    ("in _logits", LOGITS),
    ("in backward", TEMPORARY),
)


class CudaHistory:
    """Records allocations with the lines of Python that made them, until `stop`. `at_failure` is the allocator's state
    at the last allocation that failed: before the error is raised, when all that was in the way still lives."""

    def __init__(self, device: torch.device) -> None:
        self.at_failure: dict[str, Any] | None = None
        self._device = device
        torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES, stacks="python", device=device)
        attach: Any = vars(torch._C)["_cuda_attach_out_of_memory_observer"]  # there with CUDA alone
        attach(self._failed)

    def save(self, path: Path) -> None:
        """A snapshot for https://pytorch.org/memory_viz, which reads pickles."""
        torch.cuda.synchronize(self._device)
        write_bytes(path, pickle.dumps(torch.cuda.memory._snapshot(self._device)))

    def save_failure(self, path: Path) -> None:
        """The same of the last failure."""
        if self.at_failure is not None:
            write_bytes(path, pickle.dumps(self.at_failure))

    def stop(self) -> None:
        """Record no more."""
        torch.cuda.memory._record_memory_history(enabled=None)

    def _failed(self, *_: Any) -> None:
        self.at_failure = torch.cuda.memory._snapshot(self._device)


def blocks(snapshot: dict[str, Any], known: dict[int, str]) -> Iterator[Storage]:
    """The blocks in use of a snapshot, with what they are for.

    Args:
        known: category by address.
    """
    for segment in snapshot["segments"]:
        address = segment.get("address", 0)
        for block in segment["blocks"]:
            at = block.get("address", address)
            address = at + block["size"]
            if block["state"] != "active_allocated":
                continue
            stack = tuple(_lines(block.get("frames") or []))
            yield Storage(known.get(at) or _category(stack), block["size"], 0, stack=stack)


def _lines(frames: list[dict[str, Any]]) -> Iterator[str]:
    """Innermost first."""
    for frame in frames:
        if frame.get("filename") not in (None, "", "??"):
            yield f"{frame['filename']}:{frame['line']} in {frame['name']}"


def _category(stack: tuple[str, ...]) -> str:
    for words, category in _PLACES:
        if any(words in line for line in stack):
            return category
    return ACTIVATIONS if stack else WORKSPACES
