"""One rank of test_exchange.py: every case in one launch. The matrix [s, r] holds what s sends to r."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmoe.errors import ConfigError
from dmoe.ops import messages
from dmoe.ops.collectives import all_gather_rows, leave_process_group, reduce_scatter_rows
from dmoe.ops.exchange import start_exchange
from dmoe.ops.messages import Splits

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def matrices(world: int) -> dict[str, np.ndarray]:
    uneven = np.random.default_rng(world).integers(0, 6, (world, world))
    uneven[0, 1], uneven[1, 0] = 5, 1  # not symmetric
    silent, deaf = uneven.copy(), uneven.copy()
    silent[1], deaf[:, 0] = 0, 0
    return {"uneven": uneven, "silent": silent, "deaf": deaf, "nothing": uneven * 0}


def splits_of(matrix: np.ndarray, rank: int) -> Splits:
    return Splits(matrix[rank].tolist(), matrix[:, rank].tolist())


def inputs_of(
    rank: int, matrix: np.ndarray, width: int, dtype: torch.dtype, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows, one of them all zero, and weights with bits that a smaller dtype does not hold."""
    generator = np.random.default_rng(1000 * rank + width)
    num_rows = int(matrix[rank].sum())
    rows = torch.from_numpy(generator.normal(size=(num_rows, width)) * 3).to(dtype)
    rows[:1] = 0
    return rows, torch.from_numpy(generator.uniform(0.1, 1, num_rows)).to(wide)


def routed(blocks: list[Tensor], matrix: np.ndarray, receiver: int) -> Tensor:
    """The oracle: what arrives at a rank, from what every rank holds."""
    return torch.cat([t.split(matrix[s].tolist())[receiver] for s, t in enumerate(blocks)])


def loss_of(rows: Tensor, weights: Tensor | None, receiver: int) -> Tensor:
    """Sums over rows in fp64, with gradients that differ in every element."""
    weighted = rows.double().pow(3) if weights is None else rows.double().pow(3) * weights.double().unsqueeze(1).exp()
    return (receiver + 1) * weighted.sum()


def rounded(rows: Tensor, payload: str) -> Tensor:
    """What a payload makes of rows, straight through in the backward but for a rounding to bf16."""
    return rows if payload == "same" else rows.to(BF16).to(rows.dtype)


def values_and_gradients(
    matrix: np.ndarray, rank: int, world: int, width: int, dtype: torch.dtype, wide: torch.dtype | None, payload: str
) -> None:
    held = [inputs_of(r, matrix, width, dtype, wide or FP32) for r in range(world)]
    whole = [(r.clone().requires_grad_(), w.clone().requires_grad_()) for r, w in held]
    rows, weights = (t.clone().requires_grad_() for t in held[rank])
    got, got_weights = start_exchange(
        rows, None if wide is None else weights, splits_of(matrix, rank), dist.group.WORLD, payload=payload
    ).wait()
    assert got.dtype == dtype
    sent = routed([r for r, _ in whole], matrix, rank)
    if payload == "fp8":
        assert within_fp8(got, sent), (dtype, width)
        # Same values in the oracle, so that gradients can be compared exactly.
        everywhere = all_gather_uneven(got.detach())
        exact = [routed([r for r, _ in whole], matrix, r) for r in range(world)]
        received = [StraightThrough.apply(rows, value) for rows, value in zip(exact, everywhere)]
    else:
        received = [rounded(routed([r for r, _ in whole], matrix, r), payload) for r in range(world)]
        assert torch.equal(got, received[rank]), (dtype, width, payload)
    received_weights = [routed([w for _, w in whole], matrix, r) for r in range(world)]
    if wide is None:
        assert got_weights is None
    else:
        assert got_weights is not None
        assert got_weights.dtype == wide
        assert torch.equal(got_weights, received_weights[rank])
    losses = [loss_of(received[r], None if wide is None else received_weights[r], r) for r in range(world)]
    torch.stack(losses).sum().backward()
    loss_of(got, got_weights, rank).backward()
    want = whole[rank][0].grad
    if payload == "fp8":
        want = want.to(BF16).to(dtype)
    assert torch.equal(rows.grad, want), (dtype, wide, width, payload, rows.grad, want)
    if wide is not None:
        assert torch.equal(weights.grad, whole[rank][1].grad), (dtype, wide, width, payload)


class StraightThrough(torch.autograd.Function):
    """A value in place of rows, and the gradient of the rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def within_fp8(got: Tensor, sent: Tensor) -> bool:
    """e4m3 rounds to 4 significant bits, and near zero to steps of 2^-9, in units of a row's scale."""
    got, sent = got.double(), sent.double()
    scale = sent.abs().amax(dim=1, keepdim=True) / 448
    bound = torch.maximum(sent.abs() * 2**-4, scale * 2**-10) * 1.05  # and the rounding of the result
    return bool(((got - sent).abs() <= bound).all())


def all_gather_uneven(rows: Tensor) -> list[Tensor]:
    gathered: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return gathered  # type: ignore[return-value]


def all_formats(cases: dict[str, np.ndarray], rank: int, world: int) -> None:
    wides = {FP64: (FP64, FP32, None), FP32: (FP32, FP64, None), BF16: (FP32, None), FP16: (FP32, None)}
    for dtype, payload in product(wides, ("same", "bf16", "fp8")):
        for wide, width in product(wides[dtype], (1, 6)):
            values_and_gradients(cases["uneven"], rank, world, width, dtype, wide, payload)
        for name in ("silent", "deaf", "nothing"):
            values_and_gradients(cases[name], rank, world, 3, dtype, wides[dtype][0], payload)


def fp8_extremes(rank: int, world: int) -> None:
    """Rows of any size have a scale of their own; zeros stay zeros; what is not finite is not hidden."""
    ones = Splits([1] * world, [1] * world)
    for scale in (0.0, 1e-20, 1e20):
        row = torch.linspace(-1, 1, 9).mul(scale).repeat(world, 1)
        got = start_exchange(row, None, ones, dist.group.WORLD, payload="fp8").wait()[0]
        assert within_fp8(got, row), scale
        assert scale == 0 or got.abs().max() >= 0.9 * scale
    row = (2.0 ** -torch.arange(0, 18, 0.3)).repeat(world, 1)  # elements of all sizes in one row
    got = start_exchange(row, None, ones, dist.group.WORLD, payload="fp8").wait()[0]
    assert within_fp8(got, row)
    row = torch.tensor([1.0, torch.inf]).repeat(world, 1)
    got = start_exchange(row, None, ones, dist.group.WORLD, payload="fp8").wait()[0]
    assert not got[:, 1].isfinite().any()


def frozen_and_repeated(matrix: np.ndarray, rank: int, world: int) -> None:
    """Frozen rows, frozen weights, no gradient at all, several backwards, recomputation, anomaly detection."""
    splits, group = splits_of(matrix, rank), dist.group.WORLD
    for dtype in (FP32, BF16):
        held = inputs_of(rank, matrix, 4, dtype, FP32)

        def run(rows: Tensor, weights: Tensor) -> Tensor:
            return loss_of(*start_exchange(rows * 1, weights * 1, splits, group).wait(), rank)

        def gradients(needs: tuple[bool, bool], how: str, held: Any = held) -> list[Tensor | None]:
            leaves = [t.clone().requires_grad_(need) for t, need in zip(held, needs)]
            if how == "checkpoint":
                checkpoint(run, *leaves, use_reentrant=False).backward()
            elif how == "anomaly":
                with torch.autograd.detect_anomaly(check_nan=True):
                    run(*leaves).backward()
            else:
                loss = run(*leaves)
                loss.backward(retain_graph=how == "twice")
                if how == "twice":
                    loss.backward()
            return [t.grad for t in leaves]

        want = gradients((True, True), "once")
        assert want[0] is not None
        for how, needs in product(
            ("once", "twice", "checkpoint", "anomaly"), ((True, True), (True, False), (False, True))
        ):
            for w, got, need in zip(want, gradients(needs, how), needs):
                assert (got is None) if not need else torch.equal(got, w * (2 if how == "twice" else 1)), (how, needs)
        with torch.no_grad():
            rows, weights = start_exchange(*held, splits, group).wait()
        assert not rows.requires_grad
        assert not weights.requires_grad
        assert not run(*held).requires_grad


@contextmanager
def logged(log: list[str]) -> Iterator[None]:
    """Write down when messages start and when they are waited for."""
    send, received = messages._send, messages.wait

    def log_send(*args: object) -> Tensor:
        log.append("send")
        return send(*args)

    def log_received(*args: object) -> Tensor:
        log.append("wait")
        return received(*args)

    messages._send, messages.wait = log_send, log_received
    try:
        yield
    finally:
        messages._send, messages.wait = send, received


class Logged(torch.autograd.Function):
    """Identity that writes down its forward and its backward."""

    @staticmethod
    def forward(ctx, x: Tensor, log: list[str]) -> Tensor:
        ctx.log = log
        log.append("work")
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.log.append("work")
        return grad, None


def other_work_runs_meanwhile(matrix: np.ndarray, rank: int) -> None:
    log: list[str] = []
    rows, weights = (t.requires_grad_() for t in inputs_of(rank, matrix, 4, FP32, FP32))
    other = torch.ones(3, requires_grad=True)
    with logged(log):
        exchange = start_exchange(rows, weights, splits_of(matrix, rank), dist.group.WORLD)
        done = Logged.apply(other * 2, log).sum()
        loss = loss_of(*exchange.wait(), rank) + done
        assert log == ["send", "work", "wait"]
        log.clear()
        loss.backward()
        assert log == ["send", "work", "wait"], log
    with pytest.raises(AssertionError, match="waited for once"):
        exchange.wait()


def payload_is_checked() -> None:
    with pytest.raises(ConfigError, match="payload is 'fp4': must be one of same, bf16, fp8"):
        start_exchange(torch.zeros(0, 2), None, Splits([], []), dist.group.WORLD, payload="fp4")


def gather_and_scatter(rank: int, world: int) -> None:
    """Values and gradients of the equal collectives, against all ranks' rows in one process."""
    for shape in ((3, 2), (0, 2), (2,)):
        held = [torch.from_numpy(np.random.default_rng(r).normal(size=shape)) for r in range(world)]
        leaf = held[rank].clone().requires_grad_()
        got = all_gather_rows(leaf, dist.group.WORLD)
        assert torch.equal(got, torch.cat(held))
        ((rank + 1) * got.pow(2)).sum().backward()
        torch.testing.assert_close(leaf.grad, 2 * held[rank] * sum(range(1, world + 1)))
        big = [
            torch.from_numpy(np.random.default_rng(r).normal(size=(world * shape[0], *shape[1:]))) for r in range(world)
        ]
        leaf = big[rank].clone().requires_grad_()
        got = reduce_scatter_rows(leaf, dist.group.WORLD)
        torch.testing.assert_close(got.detach(), sum(big).split(shape[0])[rank] if shape[0] else got.detach())
        got.backward(held[rank])
        assert torch.equal(leaf.grad, torch.cat(held))


def rank_main(rank: int, world: int, store_path: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    cases = matrices(world)
    all_formats(cases, rank, world)
    fp8_extremes(rank, world)
    for name in ("uneven", "silent"):
        frozen_and_repeated(cases[name], rank, world)
        other_work_runs_meanwhile(cases[name], rank)
    payload_is_checked()
    gather_and_scatter(rank, world)
    dist.barrier()
    leave_process_group()
