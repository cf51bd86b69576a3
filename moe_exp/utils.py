"""Is my distributed setting right? And the set-up that the other scripts share.

torchrun --nproc_per_node=2 --master_addr=127.0.0.1 --master_port=29500 utils.py

Exit code 0: every rank arrived and the collectives give the right numbers. 1: it says what is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

# torch's own network warnings are stack traces; the diagnoses below replace them.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

import torch
import torch.distributed as dist

# A clone that is not installed works too; an installed dmoe comes first.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from dmoe.errors import DmoeError, RunError
from dmoe.ops.all_to_all import all_to_all, exchange_counts
from dmoe.ops.collectives import leave_process_group

VERDICT_MARGIN_S = 2.0  # rank 0 decides this much earlier than the others give up, so that they hear its verdict


class Launch(NamedTuple):
    """What the environment says about this process."""

    rank: int
    world_size: int
    local_rank: int
    addr: str
    port: int
    agent_store: bool
    """torchrun hosts the store itself. Otherwise rank 0 does."""

    @property
    def endpoint(self) -> str:
        return f"{self.addr}:{self.port}"


def init_distributed(timeout_s: float = 30, collective_timeout_s: float = 300) -> tuple[int, int, torch.device]:
    """Join the process group: nccl with a GPU for each local rank, gloo on the CPU without GPUs.

    Args:
        timeout_s: seconds within which all ranks must arrive.
        collective_timeout_s: seconds after which a collective fails.

    Returns:
        (rank, world size, device of this rank).

    Raises:
        RunError: with a diagnosis of what is wrong with the launch.
    """
    deadline = time.monotonic() + timeout_s
    launch = read_environment()
    device = choose_device(launch.local_rank)
    store = connect_store(launch, deadline)
    check_arrivals(store, launch, deadline, timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"group/{restart_count()}", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=collective_timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        raise RunError(
            f"all ranks arrived, but {backend} cannot connect them ({first_line(error)}): set "
            f"{backend.upper()}_SOCKET_IFNAME to the network interface that the hosts share"
        ) from error
    return launch.rank, launch.world_size, device


def print_by_rank(text: str) -> None:
    """Print every rank's text in the order of the ranks. All ranks must call it; rank 0 prints."""
    texts: list[str | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(text, texts)
    if texts is not None:
        print("\n".join(str(t) for t in texts), flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a script: a known failure becomes one line and exit code 1; the ranks leave together."""
    try:
        main()
        dist.barrier()
        leave_process_group()
    except DmoeError as error:
        print(f"rank {os.environ.get('RANK', '?')} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


# --- the environment of this process ---


def read_environment() -> Launch:
    """Read and check RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if "MASTER_ADDR" not in missing:
        check_resolves(os.environ["MASTER_ADDR"])
    if missing:
        # torchrun itself fails or waits without a word on a busy port, so a start without it looks at the port.
        if "RANK" in missing and "MASTER_PORT" not in missing:
            listen(read_int("MASTER_PORT", 1, 65535)).close()
        raise RunError(
            f"{' and '.join(missing)} not set: start it with torchrun, e.g. torchrun --nproc_per_node=2 "
            f"--master_addr={os.environ.get('MASTER_ADDR', '127.0.0.1')} "
            f"--master_port={os.environ.get('MASTER_PORT', '29500')} {Path(sys.argv[0]).name}"
        )
    world_size = read_int("WORLD_SIZE", 1, 2**31)
    rank = read_int("RANK", 0, 2**31)
    if rank >= world_size:
        raise RunError(
            f"RANK is {rank} and WORLD_SIZE is {world_size}: more processes were started than WORLD_SIZE says; it must "
            "be their number, and ranks count from 0"
        )
    local_rank = read_int("LOCAL_RANK", 0, 2**31) if os.environ.get("LOCAL_RANK") else rank
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = read_int("MASTER_PORT", 1, 65535)
    return Launch(rank, world_size, local_rank, os.environ["MASTER_ADDR"], port, agent_store)


def read_int(name: str, low: int, high: int) -> int:
    value = os.environ[name]
    if not value.isdecimal() or not low <= int(value) <= high:
        raise RunError(f"{name} is {value!r}: must be a whole number from {low} to {high}")
    return int(value)


def choose_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise RunError(
            f"LOCAL_RANK is {local_rank} and this host has {torch.cuda.device_count()} visible GPUs: start at most as "
            "many processes on it, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def restart_count() -> str:
    """A restarted job (torchrun --max-restarts) must not find the arrivals of the attempt before."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


# --- the store: does every rank find rank 0? ---


def connect_store(launch: Launch, deadline: float) -> dist.Store:
    if launch.rank == 0 and not launch.agent_store:
        return host_store(launch, deadline)
    return join_store(launch, deadline)


def host_store(launch: Launch, deadline: float) -> dist.Store:
    """The server on rank 0, after proof that rank 0 reaches itself under MASTER_ADDR."""
    listener = listen(launch.port)
    try:
        reaches_itself = probe(listener, launch, min(5.0, seconds_left(deadline)))
        fault = "another host answers"
    except OSError as error:
        reaches_itself, fault = False, str(error)
    if not reaches_itself:
        listener.close()
        raise RunError(
            f"MASTER_ADDR is {launch.addr!r}: rank 0 runs on {socket.gethostname()} and cannot be reached there "
            f"({fault}): must be, on every rank, the name or address of rank 0's host"
        )
    # The listening socket is handed over: a rank that has connected meanwhile waits in its queue.
    listener.settimeout(None)
    return open_store(launch, deadline, is_master=True, master_listen_fd=listener.detach())


def probe(listener: socket.socket, launch: Launch, seconds: float) -> bool:
    """Whether what is sent to MASTER_ADDR arrives at `listener`. OSError if nothing answers there."""
    token = secrets.token_bytes(16)
    end = time.monotonic() + seconds
    with socket.create_connection((launch.addr, launch.port), timeout=seconds) as sender:
        sender.sendall(token)
        listener.settimeout(0.5)
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                accepted, _ = listener.accept()
                with accepted:  # another rank's connection is dropped; that rank tries again
                    accepted.settimeout(0.5)
                    if accepted.recv(16) == token:
                        return True
    return False


def join_store(launch: Launch, deadline: float) -> dist.Store:
    started = time.monotonic()
    while True:
        try:
            socket.create_connection((launch.addr, launch.port), timeout=min(3.0, seconds_left(deadline))).close()
            break
        except OSError as error:
            if time.monotonic() < deadline - 0.5:
                time.sleep(0.2)
                continue
            waited = f"within {time.monotonic() - started:.0f} s"
            if isinstance(error, ConnectionRefusedError):
                raise RunError(
                    f"rank 0 did not arrive {waited}: nothing listens at {launch.endpoint}; start rank 0, or give "
                    "every rank the same MASTER_PORT"
                ) from error
            raise RunError(
                f"MASTER_ADDR is {launch.addr!r}: cannot be reached at port {launch.port} {waited} ({error}): must be "
                "the name or address of rank 0's host, with no firewall before MASTER_PORT"
            ) from error
    return open_store(launch, deadline, is_master=False)


def open_store(launch: Launch, deadline: float, **options: Any) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT."""
    opened: list[dist.Store] = []
    faults = ["no answer"]

    def connect() -> None:
        try:
            timeout = timedelta(seconds=seconds_left(deadline))
            opened.append(
                dist.TCPStore(
                    launch.addr, launch.port, launch.world_size, timeout=timeout, wait_for_workers=False, **options
                )
            )
        except RuntimeError as error:
            faults.append(first_line(error))

    # In a thread, because TCPStore waits without end for a server that accepts and says nothing.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds_left(deadline) + 0.5)
    if not opened:
        raise RunError(
            f"MASTER_ADDR:MASTER_PORT is {launch.endpoint}: what listens there is not the store of rank 0 "
            f"({faults[-1]}): must be rank 0's host and a port that no other program uses"
        )
    return opened[0]


def check_resolves(addr: str) -> None:
    try:
        socket.getaddrinfo(addr, None)
    except OSError as error:
        raise RunError(
            f"MASTER_ADDR is {addr!r}: cannot be resolved ({error.strerror}): must be the name or address of rank 0's "
            "host; 127.0.0.1 if all ranks run on this one"
        ) from error


def listen(port: int) -> socket.socket:
    """A socket that listens on `port` on every interface."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise RunError(f"MASTER_PORT is {port}: cannot listen on it ({error.strerror})") from error
        with socket.create_server(("", 0)) as other:
            free = other.getsockname()[1]
        raise RunError(
            f"MASTER_PORT is {port}: busy or not allowed on {socket.gethostname()} ({os.strerror(error.errno)}); "
            f"another program or another rank 0 has it; a free one is {free}"
        ) from error


def seconds_left(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


# --- arrival: who is there? ---


def check_arrivals(store: dist.Store, launch: Launch, deadline: float, timeout_s: float) -> None:
    """Return when all ranks have arrived with the same WORLD_SIZE; otherwise say on every rank which have not."""
    store = dist.PrefixStore(f"arrivals/{restart_count()}", store)
    if store.add(f"claims/{launch.rank}", 1) > 1:
        raise RunError(f"RANK is {launch.rank}: another process has arrived with it; each rank must have its own")
    store.set(f"arrived/{launch.rank}", f"{launch.world_size} {socket.gethostname()}")
    if launch.rank == 0:
        verdict = find_fault(store, launch, deadline - VERDICT_MARGIN_S, timeout_s)
        store.set("verdict", verdict)
        if verdict:
            linger(store, launch)
    else:
        try:
            store.wait(["verdict"], timedelta(seconds=seconds_left(deadline)))
            verdict = store.get("verdict").decode()
            store.add("heard", 1)
        except RuntimeError as error:
            raise RunError(
                f"rank 0 did not arrive within {timeout_s:.0f} s, or left at once: see its output"
            ) from error
    if verdict:
        raise RunError(verdict)


def find_fault(store: dist.Store, launch: Launch, deadline: float, timeout_s: float) -> str:
    """Rank 0: what is wrong with the ranks that have arrived by the deadline; "" if nothing is."""
    keys = [f"arrived/{rank}" for rank in range(launch.world_size)]
    with contextlib.suppress(RuntimeError):  # a time-out: the missing are named below
        store.wait(keys, timedelta(seconds=seconds_left(deadline)))
    arrived = {rank: store.get(key).decode().split(" ", 1) for rank, key in enumerate(keys) if store.check([key])}
    faults = [
        f"rank {rank} on {host} was started with WORLD_SIZE {size}, rank 0 with {launch.world_size}: must be equal"
        for rank, (size, host) in arrived.items()
        if int(size) != launch.world_size
    ]
    missing = [str(rank) for rank in range(launch.world_size) if rank not in arrived]
    if missing:
        there = ", ".join(f"{rank} on {host}" for rank, (_, host) in arrived.items())
        faults.append(
            f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(missing)} of WORLD_SIZE {launch.world_size} did "
            f"not arrive at {launch.endpoint} within {timeout_s:.0f} s (arrived: {there}): start the missing processes,"
            f" or set WORLD_SIZE to the {len(arrived)} that run"
        )
    return "; ".join(faults)


def linger(store: dist.Store, launch: Launch) -> None:
    """Rank 0 hosts the store: stay until those that arrived have heard the verdict."""
    others = sum(store.check([f"arrived/{rank}"]) for rank in range(1, launch.world_size))
    end = time.monotonic() + VERDICT_MARGIN_S
    while store.add("heard", 0) < others and time.monotonic() < end:
        time.sleep(0.05)


# --- the check itself ---


def check_collectives(rank: int, world_size: int, device: torch.device) -> list[str]:
    """Run the three collectives that the experiments use; return the names of those with wrong numbers."""
    wrong = []
    total = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(total)
    if not bool((total == world_size * (world_size + 1) / 2).all()):
        wrong.append("all-reduce")

    # Rank r sends p + 1 copies of the number r * world_size + p to rank p.
    numbers = torch.arange(world_size, device=device)
    send_counts = numbers + 1
    rows = (rank * world_size + numbers).repeat_interleave(send_counts)
    receive_counts = exchange_counts(send_counts, dist.group.WORLD)
    received = all_to_all(rows, send_counts.tolist(), receive_counts.tolist(), dist.group.WORLD)
    if not torch.equal(received, (numbers * world_size + rank).repeat_interleave(rank + 1)):
        wrong.append("all-to-all")

    word = torch.full((1000,), rank, device=device)
    dist.broadcast(word, src=world_size - 1)
    if not bool((word == world_size - 1).all()):
        wrong.append("broadcast")
    return wrong


def main() -> None:
    rank, world_size, device = init_distributed(collective_timeout_s=30)
    local_rank = os.environ.get("LOCAL_RANK", "not set")
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    print_by_rank(
        f"rank {rank} of {world_size}: host {socket.gethostname()}, pid {os.getpid()}, local rank {local_rank}, "
        f"device {device}{name}, backend {dist.get_backend()}"
    )
    wrong = check_collectives(rank, world_size, device)
    print_by_rank(
        f"rank {rank}: wrong: {', '.join(wrong)}" if wrong else f"rank {rank}: all-reduce, all-to-all, broadcast right"
    )
    faults = torch.tensor([len(wrong)], device=device)
    dist.all_reduce(faults)
    if faults.item():
        raise RunError("a collective gave wrong numbers: see the ranks above")
    if rank == 0:
        print(f"The distributed setting is right: {world_size} ranks, torch {torch.__version__}.")


if __name__ == "__main__":
    run(main)
