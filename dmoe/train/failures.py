"""Which rank failed and why: ranks tell each other through the store, and one of them prints one line.

torchrun's agent keeps the store, so it outlives every rank; without torchrun it lives in rank 0. A rank that fails
leaves its message there. One whose collective broke reads what the others left: whoever left nothing died or hangs.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dmoe.errors import DmoeError
from dmoe.train import meeting

# What a rank waits for the others to leave their message: those that are alive fail at the same collective.
_GRACE_SECONDS = 3.0
# What a rank that failed alone waits for rank 0 to say the same, which may still be loading.
_FIRST_RANK_SECONDS = 10.0
# A message begins with one of these: the rank failed by itself, or because a collective with other ranks did.
_OWN, _CONSEQUENCE = "!", "~"

# Under torchrun: a connection of our own, which stays when the process group is gone.
_own_store: Any = None


def launched_rank() -> int:
    """Rank that the launcher gave this process, also while there is no process group; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Number of ranks that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def describe(error: BaseException) -> str:
    """One line for an error."""
    text = str(error) if isinstance(error, DmoeError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def use(store: dist.Store) -> None:
    """Leave and read messages in `store` from now on."""
    global _own_store
    _own_store = store


def forget() -> None:
    """Remove what this rank left in the store in an earlier run."""
    with contextlib.suppress(Exception):
        _store().delete_key(_key(_rank()))


def leave(error: BaseException) -> None:
    """Let the other ranks know that this one failed, unless they do."""
    if _read(_rank()) is None:
        _write(_OWN + describe(error))


def others_after_broken_collective(world_size: int) -> tuple[list[int], dict[int, str]] | None:
    """(ranks that left no message, messages of those that failed by themselves), after a collective broke here.

    Waits a little for the others. None if the store cannot be reached.
    """
    deadline = time.monotonic() + _GRACE_SECONDS
    if not _write(_CONSEQUENCE):
        return None
    while True:
        left = {rank: _read(rank) for rank in range(world_size)}
        silent = [rank for rank, message in left.items() if message is None]
        if not silent or time.monotonic() > deadline:
            return silent, {rank: m[1:] for rank, m in left.items() if m is not None and m.startswith(_OWN)}
        time.sleep(0.1)


def line_to_print(error: BaseException) -> str | None:
    """What this rank prints about its error; None if a lower rank says it.

    An error of one rank alone carries its number. One that all ranks have is rank 0's, and so is a broken collective,
    or that of the lowest rank that is alive.
    """
    text, rank = describe(error), launched_rank()
    if launched_world_size() == 1:
        return text
    mine = _read(rank)
    kind = _CONSEQUENCE if mine is not None and mine.startswith(_CONSEQUENCE) else _OWN
    left = _write(kind + text)
    if rank == 0:
        return text
    if kind == _CONSEQUENCE:
        return text if all(_read(lower) is None for lower in range(rank)) else None
    deadline = time.monotonic() + (_FIRST_RANK_SECONDS if left else 0)
    while time.monotonic() < deadline:
        first = _read(0)
        if first is not None and len(first) > 1:
            if text in first:
                time.sleep(1)  # when this rank ends torchrun ends rank 0, which is about to print
                return None
            break
        time.sleep(0.1)
    return f"rank {rank}: {text}"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else launched_rank()


def _key(rank: int) -> str:
    # The count tells starts apart for those who fail before they meet; see dmoe.train.meeting.
    return f"dmoe/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _write(message: str) -> bool:
    """Whether the message is in the store."""
    with contextlib.suppress(Exception):
        _store().set(_key(_rank()), message)
        return True
    return False


def _read(rank: int) -> str | None:
    with contextlib.suppress(Exception):
        store = _store()
        if store.check([_key(rank)]):
            return store.get(_key(rank)).decode()
    return None


def _store() -> Any:
    global _own_store
    if _own_store is None and meeting.has_agent_store():
        _own_store = meeting.agent_store(timedelta(seconds=_GRACE_SECONDS))
    return _own_store or dist.distributed_c10d._get_default_store()
