"""What a rank's memory holds in a training step: by the account of `dmoe.observe.memory`, and on CUDA also traced by
the allocator.

    python utils_memory.py assets/A.json assets/B.json --out FILE.png       the accounts of several layouts, as bars
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from utils import print_by_rank

from dmoe.observe.memory.account import account_of, following_step
from dmoe.observe.memory.accounting import MemoryTimeline
from dmoe.observe.memory.operators import operators_to_look_into
from dmoe.observe.memory.picture import draw_bars, save_pictures
from dmoe.train.engine import Engine
from dmoe.train.plan import logits_width

ASSETS = Path(os.environ.get("ASSETS") or Path(__file__).resolve().parent / "assets")
MIB = 2**20


@contextmanager
def count_memory(engine: Engine, optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    """Around one training step: on leaving, the dictionary has this rank's account, in bytes: "categories" at the peak,
    their sum "peak_bytes", "largest" of each category at any time, and what the picture needs."""
    timeline = MemoryTimeline(
        device=engine.device.type,
        logits_width=logits_width(engine.parts[0].config.vocab_size, engine.mesh),
        expand=operators_to_look_into(engine.device),
    )
    count: dict[str, Any] = {"rank": dist.get_rank()}
    with timeline, following_step(timeline, engine.parameters, optimizer):
        yield count
    account = account_of(timeline)
    curve = account.curve
    count.update(
        peak_bytes=account.peak_bytes, categories=account.categories, largest=account.largest, phases=account.phases,
        curve=list(zip(curve.seconds, curve.totals)), areas=curve.categories, phase_starts=curve.phases,
    )  # fmt: skip


@contextmanager
def trace_allocations(device: torch.device, name: str) -> Iterator[None]:
    """On CUDA rank 0 records every allocation: assets/NAME_rank0.pickle for https://pytorch.org/memory_viz, and a curve
    of it in assets/NAME_rank0.png. Elsewhere nothing."""
    if device.type != "cuda" or dist.get_rank() != 0:
        yield
        return
    before = torch.cuda.memory_allocated(device)
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        yield
        torch.cuda.synchronize(device)
        snapshot = torch.cuda.memory._snapshot(device)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    ASSETS.mkdir(exist_ok=True)
    (ASSETS / f"{name}_rank0.pickle").write_bytes(pickle.dumps(snapshot))
    events = [event for trace in snapshot["device_traces"] for event in trace]
    save_picture(ASSETS / f"{name}_rank0.png", name, lambda axes: draw_trace(axes, events, before))


def save_counts(count: dict[str, Any], name: str, step: int, device: torch.device) -> None:
    """Print the account of every rank, and put all into assets/NAME.json, NAME.png and NAME.svg. Collective."""
    used = ", ".join(f"{category} {size / MIB:.1f}" for category, size in count["categories"].items() if size)
    print_by_rank(f"rank {dist.get_rank()} memory, MiB: {used}; peak {count['peak_bytes'] / MIB:.1f}")
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    if dist.get_rank() == 0:
        summary = {"name": name, "step": step, "device": str(device), "ranks": counts}
        ASSETS.mkdir(exist_ok=True)
        (ASSETS / f"{name}.json").write_text(json.dumps(summary) + "\n")
        save_pictures(ASSETS, summary, name)
        print(f"picture: {ASSETS / name}.png", flush=True)


def draw_trace(axes: Any, events: list[dict[str, Any]], before: int) -> None:
    """Allocated bytes over time; `before` is what was allocated when the recording began."""
    signs = {"alloc": 1, "free_completed": -1}
    changes = [
        (event["time_us"], signs[event["action"]] * event["size"]) for event in events if event["action"] in signs
    ]
    allocated = list(itertools.accumulate((change for _, change in changes), initial=before))
    start = changes[0][0] if changes else 0
    axes.step([(time - start) / 1e3 for time, _ in changes], [n / MIB for n in allocated[1:]], where="post")
    axes.set(xlabel="ms", ylabel="allocated, MiB", ylim=(0, None))


def save_picture(path: Path, title: str, draw: Callable[[Any], None]) -> None:
    """What `draw` draws, replaced as a whole."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    draw(axes)
    axes.set_title(title, loc="left", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=9)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
    os.replace(temporary, path)


def compare(files: list[Path], out: Path) -> None:
    """Bars of the ranks of several runs of test_mesh.py, side by side."""
    ranks = []
    for file in files:
        summary = json.loads(file.read_text())
        name = summary["name"].removeprefix("mesh_").removesuffix("_small")
        ranks += [rank | {"label": f"{name}\nrank {rank['rank']}"} for rank in summary["ranks"]]
    title = "memory at the peak, by layout (replicas x shards x tensor parallel)"
    save_picture(out, title, lambda axes: draw_bars(axes, {"ranks": ranks}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare the memory of layouts.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    compare(options.files, options.out)
