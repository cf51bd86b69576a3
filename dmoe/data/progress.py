"""Progress of one stage of work on stderr: a bar on a terminal, one line elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(message: str, enabled: bool = True) -> None:
    """One line on stderr, if enabled."""
    if enabled:
        print(f"data: {message}", file=sys.stderr, flush=True)


@contextmanager
def stage(title: str, total_bytes: int | None, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show a stage while the block runs; gives a function to call with the number of bytes just done.

    `total_bytes` None: not known beforehand.
    """
    if not enabled:
        yield lambda num_bytes: None
        return
    if not sys.stderr.isatty():
        say(title if total_bytes is None else f"{title} ({total_bytes / 1e6:.1f} MB)")
        yield lambda num_bytes: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("data: {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)
