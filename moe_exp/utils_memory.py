"""What a rank's memory holds in a training step: counted by kind, and on CUDA also traced by the allocator."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from utils import print_by_rank

from dmoe.moe.sharded import local
from dmoe.train.engine import Engine

ASSETS = Path(os.environ.get("ASSETS") or Path(__file__).resolve().parent / "assets")
KINDS = ("weights", "gradients", "optimiser", "activations")
MIB = 2**20


@contextmanager
def count_memory(engine: Engine, optimizer: torch.optim.Optimizer) -> Iterator[dict[str, int]]:
    """Around one training step: on leaving, the dictionary has the bytes on this rank of each of `KINDS`.

    Activations are what the forward keeps for the backward, weights left out, the ones that FSDP has gathered too.
    """
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        part = local(tensor)
        if hasattr(part, "trigger_wait"):  # the result of a collective that has not been waited for has no memory
            part = part.trigger_wait()
        storage = part.untyped_storage()
        if storage.data_ptr() not in {weight.untyped_storage().data_ptr() for weight in weights_in_use(engine)}:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    count: dict[str, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield count
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    count["weights"] = count["gradients"] = num_bytes(weights_in_use(engine))  # a gradient for each weight
    count["optimiser"] = num_bytes([local(t) for t in states])
    count["activations"] = sum(kept.values())


def weights_in_use(engine: Engine) -> list[Tensor]:
    """This rank's parts of the parameters; while FSDP has gathered a layer, the whole ones of that layer."""
    return [local(p) for p in engine.parameters]


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


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
    save_picture(f"{name}_rank0", lambda axes: draw_trace(axes, events, before))


def save_counts(count: dict[str, int], name: str) -> None:
    """Print the counts of every rank and draw them into assets/NAME.png. Collective."""
    in_mib = ", ".join(f"{kind} {count[kind] / MIB:.1f}" for kind in KINDS)
    print_by_rank(f"rank {dist.get_rank()} memory, MiB: {in_mib}")
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    if dist.get_rank() == 0:
        save_picture(name, lambda axes: draw_counts(axes, counts))
        print(f"picture: {ASSETS / name}.png", flush=True)


def draw_counts(axes: Any, counts: list[dict[str, int]]) -> None:
    """A stacked bar for each rank."""
    bottom = [0.0] * len(counts)
    for kind in KINDS:
        heights = [count[kind] / MIB for count in counts]
        axes.bar(range(len(counts)), heights, bottom=bottom, label=kind)
        bottom = [b + h for b, h in zip(bottom, heights)]
    axes.set(xlabel="rank", ylabel="MiB", xticks=range(len(counts)))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


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


def save_picture(name: str, draw: Callable[[Any], None]) -> None:
    """assets/NAME.png with what `draw` draws, replaced as a whole."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    draw(axes)
    axes.set_title(name)
    ASSETS.mkdir(exist_ok=True)
    temporary = ASSETS / f"{name}.tmp"
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    os.replace(temporary, ASSETS / f"{name}.png")
