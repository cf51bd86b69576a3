"""All-to-all with unequal lengths, list form and single form, and how fast it is.

torchrun --nproc_per_node=2 --master_addr=127.0.0.1 --master_port=29500 test_all_to_all.py [--no-sweep]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from utils import init_distributed, print_by_rank, run

from dmoe.errors import RunError
from dmoe.ops.all_to_all import all_to_all

ASSETS = Path(__file__).resolve().parent / "assets"
KIB, MIB = 2**10, 2**20


def send_counts_of(rank: int, world_size: int) -> list[int]:
    """How many numbers `rank` sends to each rank. Two ranks: 2, 3 and 3, 3. More than two: not symmetric."""
    return [2 + max(peer, min(rank, 1)) for peer in range(world_size)]


def numbers_of(rank: int, world_size: int) -> np.ndarray:
    """What `rank` holds: 0, 1, 2, ... on rank 0; 10, 11, 12, ... on rank 1; and so on (100, ... if 10 are too few)."""
    most = max(sum(send_counts_of(r, world_size)) for r in range(world_size))
    stride = 10 ** len(str(most - 1))
    return rank * stride + np.arange(sum(send_counts_of(rank, world_size)))


def expected_of(rank: int, world_size: int) -> list[list[int]]:
    """By numpy alone: the block that `rank` must get from each rank."""
    blocks = []
    for sender in range(world_size):
        ends = np.cumsum(send_counts_of(sender, world_size))[:-1]
        blocks.append(np.split(numbers_of(sender, world_size), ends)[rank].tolist())
    return blocks


def list_form(blocks: list[Tensor], receive_counts: list[int]) -> list[Tensor]:
    """`dist.all_to_all`; on gloo with unequal sizes, which it refuses, one send and one receive for each pair."""
    received = [blocks[0].new_empty(count) for count in receive_counts]
    if not pairwise_needed():
        dist.all_to_all(received, blocks)
        return received
    rank = dist.get_rank()
    received[rank].copy_(blocks[rank])
    peers = [peer for peer in range(dist.get_world_size()) if peer != rank]
    work = [dist.irecv(received[peer], src=peer) for peer in peers]
    work += [dist.isend(blocks[peer], dst=peer) for peer in peers]
    for request in work:
        if request is not None:
            request.wait()
    return received


def pairwise_needed() -> bool:
    # Decided from the sizes of all ranks: a rank whose own sizes are equal would not be refused, and would wait for
    # the ones that were.
    world_size = dist.get_world_size()
    sizes = {count for rank in range(world_size) for count in send_counts_of(rank, world_size)}
    return dist.get_backend() == "gloo" and len(sizes) > 1


def show_exchange(rank: int, world_size: int, device: torch.device) -> None:
    """Both forms on the small example; print before and after, and raise RunError if one is wrong."""
    send_counts = send_counts_of(rank, world_size)
    receive_counts = [send_counts_of(sender, world_size)[rank] for sender in range(world_size)]
    numbers = torch.from_numpy(numbers_of(rank, world_size)).to(device)
    blocks = [block.contiguous() for block in numbers.split(send_counts)]
    print_by_rank(
        f"rank {rank} before: {[block.tolist() for block in blocks]}, sends {send_counts}, receives {receive_counts}"
    )
    if rank == 0 and pairwise_needed():
        print("list form: gloo's dist.all_to_all refuses unequal sizes; using isend and irecv for each pair instead")

    results = {
        "list form": [block.tolist() for block in list_form(blocks, receive_counts)],
        "single form": [
            block.tolist()
            for block in all_to_all(numbers, send_counts, receive_counts, dist.group.WORLD).split(receive_counts)
        ],
    }
    expected = expected_of(rank, world_size)
    wrong = [form for form, result in results.items() if result != expected]
    print_by_rank("\n".join(f"rank {rank} after, {form}: {result}" for form, result in results.items()))
    num_wrong = torch.tensor(len(wrong), device=device)
    dist.all_reduce(num_wrong)
    if num_wrong.item():
        raise RunError(f"{' and '.join(wrong) or 'another rank'} wrong: rank {rank} must get {expected}")
    if rank == 0:
        print(f"verified: both forms give what numpy says on {world_size} ranks", flush=True)


def median_seconds(exchange: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Median over `repeats` of the slowest rank's time."""
    times = []
    for _ in range(repeats + 2):  # two to warm up
        dist.barrier()
        start = time.perf_counter()
        exchange()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        times.append(seconds.item())
    return statistics.median(times[2:])


def timed_exchange(share: int, world_size: int, device: torch.device) -> float:
    """Seconds of an exchange in which every rank sends `share` bytes to each rank."""
    counts = [share] * world_size
    payload = torch.zeros(share * world_size, dtype=torch.uint8, device=device)
    return median_seconds(lambda: all_to_all(payload, counts, counts, dist.group.WORLD), device, repeats=9)


def sweep(rank: int, world_size: int, device: torch.device) -> None:
    """Equal blocks from 4 KiB up: a table and a plot on rank 0."""
    largest = 256 * MIB if device.type == "cuda" else 16 * MIB
    if rank == 0:
        print(
            "\nbandwidth: S = bytes that each rank holds, an equal share for every rank; t = median of 9, slowest rank"
        )
        print("algorithmic = S / t; bus = S / t * (W - 1) / W, the part that leaves the rank")
        print(f"{'S':>10} {'t, ms':>10} {'algorithmic, GB/s':>18} {'bus, GB/s':>10}")
    rows = []
    size = 4 * KIB
    while size <= largest:
        share = size // world_size
        seconds = timed_exchange(share, world_size, device)
        algorithmic = share * world_size / seconds / 1e9
        bus = algorithmic * (world_size - 1) / world_size
        rows.append((size, algorithmic, bus))
        if rank == 0:
            label = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
            print(f"{label:>10} {seconds * 1e3:>10.3f} {algorithmic:>18.3f} {bus:>10.3f}", flush=True)
        size *= 4
    if rank == 0:
        print(f"plot: {plot(rows, world_size)}")


def plot(rows: list[tuple[int, float, float]], world_size: int) -> Path:
    """Write the bandwidths over the message size as a PNG; its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    backend = dist.get_backend()
    sizes, algorithmic, bus = zip(*rows)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(sizes, algorithmic, marker="o", label="algorithmic, S / t")
    axes.plot(sizes, bus, marker="s", label="bus, S / t * (W - 1) / W")
    axes.set(xlabel="S, bytes per rank", ylabel="GB/s", title=f"all-to-all, {backend}, {world_size} ranks")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    ASSETS.mkdir(exist_ok=True)
    path = ASSETS / f"all_to_all_{backend}_{world_size}.png"
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="All-to-all with unequal lengths: shown, verified, timed.")
    parser.add_argument("--no-sweep", action="store_true", help="skip the bandwidth sweep")
    parser.add_argument("--verify", action="store_true", help="always on; accepted so that every script takes it")
    options = parser.parse_args()
    rank, world_size, device = init_distributed()
    show_exchange(rank, world_size, device)
    if not options.no_sweep:
        sweep(rank, world_size, device)


if __name__ == "__main__":
    run(main)
