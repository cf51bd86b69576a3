"""A summary of memory as text: a line for each category, a column for each rank, and the estimate beside it."""

from __future__ import annotations

from typing import Any

from dmoe.observe.memory.categories import CATEGORIES, PHASES, UNACCOUNTED

_MAX_COLUMNS = 8


def render(summary: dict[str, Any]) -> str:
    """The table of a summary (`watch.MemoryWatch`), of at most 8 ranks: the first, and the one that needs most."""
    ranks = summary["ranks"][:_MAX_COLUMNS]
    most = max(summary["ranks"], key=lambda r: r["peak_bytes"])
    if most not in ranks:
        ranks[-1] = most
    estimated = any(r.get("estimate") for r in ranks)
    header = [f"step {summary['step']}, {summary['device']}, MiB"]
    for rank in ranks:
        header += [f"rank {rank['rank']}", *(["estimate"] if estimated else [])]
    rows = [header]

    def row(title: str, measured: list[int], estimates: list[int | None]) -> None:
        cells = []
        for size, estimate in zip(measured, estimates):
            cells += [_mib(size), *([_mib(estimate)] if estimated else [])]
        rows.append([title, *cells])

    for category in (*CATEGORIES, UNACCOUNTED):
        sizes = [r["categories"].get(category, 0) for r in ranks]
        estimates = [r["estimate"].get(category, 0) if r.get("estimate") else None for r in ranks]
        if any(sizes) or any(estimates):
            row(category, sizes, estimates)
    totals = [sum(r["estimate"].values()) if r.get("estimate") else None for r in ranks]
    row("peak", [r["peak_bytes"] for r in ranks], totals)
    if estimated:
        row("estimate / measured", [0] * len(ranks), totals)
        rows[-1] = ["estimate / measured"]
        for rank, total in zip(ranks, totals):
            rows[-1] += ["", "" if total is None else f"{total / rank['peak_bytes'] - 1:+.1%}"]
    for phase in PHASES:
        row(f"  most in {phase}", [sum(r["phases"].get(phase, {}).values()) for r in ranks], [None] * len(ranks))
    if any("rss_bytes" in r for r in ranks):
        row("  resident memory of the process", [r.get("rss_bytes", 0) for r in ranks], [None] * len(ranks))
    return _aligned(rows)


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"


def _aligned(rows: list[list[str]]) -> str:
    columns = max(map(len, rows))
    full = [row + [""] * (columns - len(row)) for row in rows]
    widths = [max(len(row[i]) for row in full) for i in range(columns)]
    lines = (
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in full
    )
    return "\n".join(line.rstrip() for line in lines)
