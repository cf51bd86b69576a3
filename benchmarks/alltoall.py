"""Time the exchange of rows between ranks, alone and in a mixture-of-experts layer under expert parallelism.

    python benchmarks/alltoall.py --ranks 2                   # starts the ranks itself, over loopback
    torchrun --nproc-per-node 8 benchmarks/alltoall.py        # NCCL where there is a GPU for each rank, else gloo

Prints two tables: the bandwidth of `all_to_all` over message sizes, and the time of a layer's forward and backward, its
tokens spread evenly over the experts or crowded on those of the last rank, for what is sent (a row for each pick, or
each token once to a rank: `parallel.ep_sends`) and each payload. There, "exchange" is the share of the step spent in
the exchange when each message is waited for at once, and "hidden" the part of that time which the step no longer spends
when the shared expert is computed meanwhile: with gloo, by how much less a rank is kept waiting; with NCCL, whose host
does not wait, the difference between the steps. "alone" is the same layer with all its experts on each rank and nothing
exchanged. `--json FILE` writes both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from dmoe.cli.bench import machine
from dmoe.moe import MoE, MoEConfig
from dmoe.moe.dispatch import AllToAllDispatcher, Dispatcher, SharedFunction
from dmoe.moe.dispatch_tokens import TokenDispatcher
from dmoe.moe.router import Routing
from dmoe.ops import messages
from dmoe.ops.all_to_all import all_to_all
from dmoe.ops.collectives import leave_process_group
from dmoe.ops.messages import PAYLOADS

SIZES = tuple(2**power for power in range(12, 31, 2))
ROUTINGS = ("balanced", "skewed")
SENDS: dict[str, Callable[..., Dispatcher]] = {"picks": AllToAllDispatcher, "tokens": TokenDispatcher}


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of the slowest rank, from a common start."""
    synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    run()
    synchronize(device)
    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_messages(sizes: tuple[int, ...], rounds: int, device: torch.device) -> list[dict[str, float]]:
    """Median seconds of an even `all_to_all` of that many bytes a rank, and the bytes a second that leave a rank."""
    world = dist.get_world_size()
    results = []
    for size in sizes:
        rows = torch.zeros(max(1, size // 1024 // world) * world, 512, dtype=torch.bfloat16, device=device)
        counts = [rows.shape[0] // world] * world
        run = partial(all_to_all, rows, counts, counts, dist.group.WORLD)
        took = statistics.median([seconds(run, device) for _ in range(rounds + 2)][2:])
        sent = rows.nbytes * (world - 1) / world
        results.append({"bytes": rows.nbytes, "seconds": took, "bytes_per_second": sent / took})
    return results


def waiting(dispatch: Dispatcher) -> Dispatcher:
    """The same exchange without overlap: the shared expert is computed after the rows have come back."""

    def dispatch_and_wait(
        x_TD: Tensor, routing: Routing, experts: Callable[..., Tensor], shared: SharedFunction | None
    ) -> Tensor:
        y_TD = dispatch(x_TD, routing, experts, None)
        return y_TD if shared is None else y_TD + shared(x_TD)

    return dispatch_and_wait


class Layer:
    """One MoE layer under expert parallelism, and a batch."""

    def __init__(self, args: argparse.Namespace, routing: str, device: torch.device) -> None:
        torch.manual_seed(0)
        config = MoEConfig(
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_experts=args.num_experts,
            top_k=args.top_k,
            shared_intermediate_size=args.shared_size,
            aux_loss_coef=0,
            z_loss_coef=0,
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.layer = MoE(config, device=device, dtype=dtype)
        self.whole = MoE(config, device=device, dtype=dtype)
        self.whole.load_state_dict(self.layer.state_dict())
        rank, world = dist.get_rank(), dist.get_world_size()
        num_local = args.num_experts // world
        for name, parameter in list(self.layer.experts.named_parameters()):
            own = parameter.detach()[rank * num_local : (rank + 1) * num_local].clone()
            self.layer.experts.register_parameter(name, nn.Parameter(own))
        torch.manual_seed(1 + rank)
        self.x = torch.randn(args.tokens, args.hidden_size, device=device).to(dtype).requires_grad_()
        self.grad = torch.randn_like(self.x)
        with torch.no_grad():
            if routing == "skewed":  # a direction that all tokens have, and that the last rank's experts like
                self.x[:, 0] = 4
                for layer in (self.layer, self.whole):
                    layer.router.weight[-num_local:, 0] += 1

    def step(self, dispatcher: Dispatcher) -> None:
        self.layer.dispatcher = dispatcher
        self.layer(self.x).backward(self.grad)

    def step_alone(self) -> None:
        self.whole(self.x).backward(self.grad)

    def received_rows(self) -> int:
        """The most rows that a rank takes in."""
        with torch.no_grad():
            ids_TK = self.layer.router(self.x).topk_ids_TK
        counts = torch.bincount(ids_TK.flatten(), minlength=self.layer.config.num_experts)
        dist.all_reduce(counts)
        return int(counts.view(dist.get_world_size(), -1).sum(1).max())


class Clock:
    """Time inside sending and waiting. On a GPU the device is waited for around each, which leaves no overlap."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.total = device, 0.0

    def __enter__(self) -> Clock:
        self.saved = messages._send, messages.wait
        messages._send, messages.wait = (self._timed(function) for function in self.saved)
        return self

    def __exit__(self, *_: object) -> None:
        messages._send, messages.wait = self.saved

    def _timed(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*args: Any) -> Tensor:
            synchronize(self.device)
            start = time.perf_counter()
            result = function(*args)
            synchronize(self.device)
            self.total += time.perf_counter() - start
            return result

        return timed


def time_layer(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Median seconds of a step with and without overlap, for each routing and payload; see the module's docstring.

    Every round runs all of them in random order, the same on every rank, so that a slow moment of the machine falls on
    all. The exchange's own time is that of the rank that spends least in it: the others wait for it.
    """
    group = dist.group.WORLD
    assert group is not None
    layers = {routing: Layer(args, routing, device) for routing in ROUTINGS}
    forms = [(sends, payload) for sends in SENDS for payload in PAYLOADS if sends in args.sends.split(",")]
    kinds = [(r, *form, overlaps) for r in ROUTINGS for form in forms for overlaps in (True, False)]
    times: dict[Any, list[float]] = {kind: [] for kind in kinds}
    inside: dict[Any, list[float]] = {kind: [] for kind in kinds}
    alone: dict[str, list[float]] = {routing: [] for routing in ROUTINGS}
    order = random.Random(0)
    for round_number in range(args.rounds + 1):
        for routing in ROUTINGS:
            took = seconds(layers[routing].step_alone, device)
            if round_number:
                alone[routing].append(took)
        for kind in order.sample(kinds, len(kinds)):
            routing, sends, payload, overlaps = kind
            dispatcher = SENDS[sends](group, args.num_experts, payload=payload)
            step = partial(layers[routing].step, dispatcher if overlaps else waiting(dispatcher))
            took, spent = seconds(step, device), seconds_inside(step, device)
            if round_number:
                times[kind].append(took)
                inside[kind].append(spent)
    rows = [summarize(layers[r], r, *form, times, inside, device) for r in ROUTINGS for form in forms]
    return [row | {"seconds_alone": statistics.median(alone[row["routing"]])} for row in rows]


def seconds_inside(run: Callable[[], Any], device: torch.device) -> float:
    with Clock(device) as clock:
        run()
    spent = torch.tensor(clock.total, dtype=torch.float64, device=device)
    dist.all_reduce(spent, op=dist.ReduceOp.MIN)
    return float(spent)


def summarize(
    layer: Layer, routing: str, sends: str, payload: str, times: dict[Any, list[float]],
    inside: dict[Any, list[float]], device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    overlapped, in_turn = ((routing, sends, payload, overlaps) for overlaps in (True, False))
    exchange = statistics.median(inside[in_turn])
    if device.type == "cuda":
        saved = statistics.median(w - o for w, o in zip(times[in_turn], times[overlapped]))
    else:
        saved = exchange - statistics.median(inside[overlapped])
    seconds_waiting = statistics.median(times[in_turn])
    return {
        "routing": routing,
        "sends": sends,
        "payload": payload,
        "most_rows": layer.received_rows(),
        "seconds_waiting": seconds_waiting,
        "seconds_overlapped": statistics.median(times[overlapped]),
        "exchange_seconds": exchange,
        "exchange_share": exchange / seconds_waiting,
        "hidden": saved / exchange,
    }


def report(summary: dict[str, Any]) -> None:
    where = summary["machine"]
    print(f"{where['device']}, threads a rank: {where['threads']}, torch {where['torch']}")
    print(f"{summary['ranks']} ranks, {summary['backend']}, median of {summary['rounds']}")
    print(f"\n{'message a rank':>16}{'time':>12}{'bandwidth':>14}")
    for r in summary["messages"]:
        print(f"{r['bytes'] / 1024:>12.0f} KiB{r['seconds'] * 1e3:>9.3f} ms{r['bytes_per_second'] / 1e9:>9.3f} GB/s")
    print(f"\n{summary['layer']}\n")
    print(
        f"{'routing':10}{'sends':>7}{'payload':>8}{'most rows':>11}{'no overlap':>13}{'exchange':>10}{'overlap':>11}"
        f"{'hidden':>9}{'alone':>11}"
    )
    for r in summary["steps"]:
        print(
            f"{r['routing']:10}{r['sends']:>7}{r['payload']:>8}{r['most_rows']:>11}"
            f"{r['seconds_waiting'] * 1e3:>10.2f} ms{r['exchange_share']:>10.1%}"
            f"{r['seconds_overlapped'] * 1e3:>8.2f} ms{r['hidden']:>9.1%}{r['seconds_alone'] * 1e3:>8.2f} ms"
        )


def measure(args: argparse.Namespace) -> None:
    """One rank, its process group initialised."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    summary = {
        "machine": machine(device),
        "ranks": dist.get_world_size(),
        "backend": dist.get_backend(),
        "rounds": args.rounds,
        "messages": time_messages(tuple(s for s in SIZES if s <= args.max_bytes), args.rounds, device),
        "layer": f"layer: {args.tokens} tokens a rank, D={args.hidden_size} F={args.intermediate_size} "
        f"E={args.num_experts} K={args.top_k} shared={args.shared_size}",
        "steps": time_layer(args, device),
    }
    if dist.get_rank() == 0:
        report(summary)
        if args.json:
            args.json.write_text(json.dumps(summary, indent=1))


def rank_main(local_rank: int, args: argparse.Namespace, **init: Any) -> None:
    # A GPU for each rank of this machine, or none at all.
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", args.ranks))
    use_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local_world
    if use_gpu:
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(args.threads)
    dist.init_process_group("nccl" if use_gpu else "gloo", **init)
    measure(args)
    dist.barrier()
    leave_process_group()


def spawned(rank: int, args: argparse.Namespace, store_path: str) -> None:
    rank_main(rank, args, store=dist.FileStore(store_path, args.ranks), rank=rank, world_size=args.ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start here; torchrun's own count otherwise")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--max-bytes", type=int, default=2**26, help="largest message")
    parser.add_argument("--tokens", type=int, default=2048, help="of a rank")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--shared-size", type=int, default=512, help="width of the shared expert")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--sends", default="picks,tokens", help="what travels, with commas between")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(int(os.environ["LOCAL_RANK"]), args)
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(spawned, (args, str(Path(folder) / "store")), nprocs=args.ranks)


if __name__ == "__main__":
    main()
