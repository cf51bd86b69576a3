"""One rank of tests/ops/test_all_to_all.py: every case in one launch. The matrix [s, r] holds what s sends to r."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from dmoe.errors import ConfigError
from dmoe.ops.all_to_all import all_to_all, exchange_counts
from dmoe.ops.collectives import leave_process_group


def matrices(world: int) -> dict[str, np.ndarray]:
    uneven = np.random.default_rng(world).integers(0, 6, (world, world))
    uneven[0, 1], uneven[1, 0] = 5, 1  # not symmetric
    silent, deaf = uneven.copy(), uneven.copy()
    silent[1], deaf[:, 0] = 0, 0
    return {"uneven": uneven, "silent": silent, "deaf": deaf, "nothing": uneven * 0, "even": uneven * 0 + 2}


def rows_of(rank: int, matrix: np.ndarray, width: int) -> np.ndarray:
    return np.random.default_rng(100 + rank).normal(size=(int(matrix[rank].sum()), width))


def received_by(rank: int, matrix: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """The oracle: what numpy concatenates from what each rank holds."""
    return np.concatenate([np.split(rows[s], np.cumsum(matrix[s])[:-1])[rank] for s in range(len(rows))])


def values_and_gradients(matrix: np.ndarray, rank: int, world: int, compiled: bool) -> None:
    send, receive = matrix[rank].tolist(), matrix[:, rank].tolist()
    group = dist.group.WORLD
    rows = [rows_of(r, matrix, 3) for r in range(world)]
    expected = torch.from_numpy(received_by(rank, matrix, rows))

    # One process: the loss sum_r w_r * sum((r + 1) * y_r^3), whose gradient reaches a row through its receiver.
    whole = [torch.from_numpy(r).requires_grad_() for r in rows]
    loss = torch.zeros((), dtype=torch.float64)
    for r in range(world):
        blocks = [whole[s].split(matrix[s].tolist())[r] for s in range(world)]
        loss = loss + (r + 1) * torch.cat(blocks).pow(3).sum()
    loss.backward()

    def exchange(x: torch.Tensor) -> torch.Tensor:
        return all_to_all(x * 1.0, send, receive, group)

    ways = {
        "eager": exchange,
        "checkpointed": lambda x: checkpoint(exchange, x, use_reentrant=False),
    }
    if compiled:
        ways["compiled"] = torch.compile(exchange, fullgraph=True, backend="aot_eager")
    for name, way in ways.items():
        x = torch.from_numpy(rows[rank]).requires_grad_()
        y = way(x)
        assert type(y) is torch.Tensor, name
        torch.testing.assert_close(y.detach(), expected, rtol=0, atol=0)
        ((rank + 1) * y.pow(3).sum()).backward()
        torch.testing.assert_close(x.grad, whole[rank].grad)

    strided = torch.from_numpy(np.ascontiguousarray(rows[rank].T)).t()
    torch.testing.assert_close(all_to_all(strided, send, receive, group), expected, rtol=0, atol=0)


def dtypes(matrix: np.ndarray, rank: int, world: int) -> None:
    send, receive = matrix[rank].tolist(), matrix[:, rank].tolist()
    for dtype in (
        torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64,
    ):  # fmt: skip
        for shape in ((), (2,), (2, 3)):
            width = int(np.prod(shape))
            rows = [rows_of(r, matrix, width) * 10 for r in range(world)]
            cast = [torch.from_numpy(r).to(dtype).reshape(-1, *shape) for r in rows]
            received = all_to_all(cast[rank], send, receive, dist.group.WORLD)
            expected = torch.from_numpy(received_by(rank, matrix, rows)).to(dtype).reshape(-1, *shape)
            assert received.dtype == dtype
            assert received.shape == expected.shape, (dtype, shape)
            same = received.to(torch.complex128).equal(expected.to(torch.complex128))  # every value is exact in it
            assert same, (dtype, shape)


def counts(matrix: np.ndarray, rank: int, world: int) -> None:
    group = dist.group.WORLD
    got = exchange_counts(torch.from_numpy(matrix[rank]), group)
    assert got.tolist() == matrix[:, rank].tolist()
    per_expert = np.arange(world * world * 3).reshape(world, world, 3)
    assert exchange_counts(torch.from_numpy(per_expert[rank]), group).tolist() == per_expert[:, rank].tolist()


def counts_read_inside_compile(matrix: np.ndarray, rank: int) -> None:
    """As a compiled MoE layer does: the counts are exchanged and read inside the graph."""

    def exchange(x: torch.Tensor, send: torch.Tensor) -> torch.Tensor:
        receive = exchange_counts(send, dist.group.WORLD)
        return all_to_all(x, send.tolist(), receive.tolist(), dist.group.WORLD)

    x = torch.from_numpy(rows_of(rank, matrix, 3)).requires_grad_()
    send = torch.from_numpy(matrix[rank])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        y = torch.compile(exchange, fullgraph=True, backend="aot_eager")(x, send)
        y.sum().backward()
    assert torch.equal(y, exchange(x, send))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def errors(world: int) -> None:
    group, ones = dist.group.WORLD, [1] * world
    x = torch.zeros(world, 2)
    with pytest.raises(ConfigError, match=rf"send_counts is \[1\]: must have {world} entries"):
        all_to_all(x, [1], ones, group)
    with pytest.raises(ConfigError, match=rf"receive_counts is .*: must have {world} entries"):
        all_to_all(x, ones, [*ones, 1], group)
    with pytest.raises(ConfigError, match=r"receive_counts is \[-1.*0 or greater"):
        all_to_all(x, ones, [-1] * world, group)
    with pytest.raises(ConfigError, match=rf"in sum {world}: must add up to the {world + 1} rows"):
        all_to_all(torch.zeros(world + 1, 2), ones, ones, group)
    with pytest.raises(ConfigError, match=r"rows_RC has shape \[\]"):
        all_to_all(torch.tensor(1.0), ones, ones, group)
    with pytest.raises(ConfigError, match="complex64 and requires a gradient"):
        all_to_all(x.to(torch.complex64).requires_grad_(), ones, ones, group)
    with pytest.raises(ConfigError, match=r"send_counts is torch.int32: must be torch.int64"):
        exchange_counts(torch.ones(world, dtype=torch.int32), group)
    with pytest.raises(ConfigError, match=r"send_counts has shape"):
        exchange_counts(torch.ones(world + 1, dtype=torch.int64), group)


def rank_main(rank: int, world: int, store_path: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    cases = matrices(world)
    for name, matrix in cases.items():
        values_and_gradients(matrix, rank, world, compiled=name == "silent")  # tracing is slow: once, with no rows
        counts(matrix, rank, world)
    dtypes(cases["uneven"], rank, world)
    dtypes(cases["silent"], rank, world)
    counts_read_inside_compile(cases["uneven"], rank)
    errors(world)
    dist.barrier()
    leave_process_group()
