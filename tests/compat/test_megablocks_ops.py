"""`megablocks.ops`: sorting, counting and moving rows, against loops in integers and float64."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from dmoe.compat.megablocks import ops
from dmoe.compat.megablocks.backend import kernels
from dmoe.errors import ConfigError

BLOCK, WIDTH = 4, 3


class Case(NamedTuple):
    """A routing and its metadata, computed here with numpy."""

    top_k: int
    indices: Tensor
    bin_ids: Tensor
    bins: Tensor
    padded_bins: Tensor
    x: Tensor
    weights: Tensor
    slots: np.ndarray
    """Row of the padded buffer of each copy."""

    @property
    def tokens(self) -> int:
        return len(self.indices) // self.top_k


def case(tokens: int, top_k: int, experts: int, used: list[int] | None = None) -> Case:
    """`used`: the experts that receive tokens; each token's picks are distinct."""
    rng = np.random.default_rng(7)
    used = list(range(experts)) if used is None else used
    ids = np.array([rng.permutation(used)[:top_k] for _ in range(tokens)], dtype=np.int64).reshape(-1)
    order = np.argsort(ids, kind="stable")
    counts = np.bincount(ids, minlength=experts)
    padded = -(-counts // BLOCK) * BLOCK
    starts = np.cumsum(padded) - padded
    slots = np.array([starts[ids[p]] + (ids[order[:r]] == ids[p]).sum() for r, p in enumerate(order)], dtype=np.int64)
    int32 = {
        "indices": order, "bin_ids": ids[order], "bins": np.cumsum(counts), "padded_bins": np.cumsum(padded)
    }  # fmt: skip
    return Case(
        top_k, **{k: torch.from_numpy(v).int() for k, v in int32.items()},
        x=torch.from_numpy(rng.normal(size=(tokens, WIDTH))),
        weights=torch.from_numpy(rng.normal(size=tokens * top_k)), slots=slots,
    )  # fmt: skip


CASES = {
    "even": case(9, 2, 5),
    "experts without tokens": case(6, 2, 7, used=[1, 4, 5]),
    "all on one expert": case(9, 1, 4, used=[2]),
    "every expert": case(4, 3, 3),
    "one expert": case(5, 1, 1),
    "one token": case(1, 2, 6),
    "no token": case(0, 2, 4),
}
every_case = pytest.mark.parametrize("c", CASES.values(), ids=CASES.keys())


def same(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def summed(c: Case, rows: Tensor, row_of_copy: list[int | None], weights: Tensor | None) -> Tensor:
    """[T, H] by a loop; a copy whose row is None was dropped."""
    out = torch.zeros(c.tokens, WIDTH, dtype=torch.float64)
    for pick, row in zip(c.indices.tolist(), row_of_copy):
        if row is not None:
            out[pick // c.top_k] += rows[row] * (1 if weights is None else weights[pick])
    return out


@every_case
def test_gather_and_scatter(c: Case) -> None:
    want = torch.zeros(len(c.indices), WIDTH, dtype=torch.float64)
    for row, pick in enumerate(c.indices.tolist()):
        want[row] = c.x[pick // c.top_k]
    same(ops.gather(c.x, c.indices, c.bin_ids, c.bins, c.top_k), want)
    rows = torch.randn(len(c.indices), WIDTH, dtype=torch.float64)
    for weights in (None, c.weights):
        got = ops.scatter(rows, c.indices, c.bin_ids, weights, c.bins, c.top_k)
        same(got, summed(c, rows, list(range(len(rows))), weights))


@every_case
def test_padded_gather_and_scatter(c: Case) -> None:
    want = torch.zeros(int(c.padded_bins[-1]), WIDTH, dtype=torch.float64)
    for slot, pick in zip(c.slots, c.indices.tolist()):
        want[slot] = c.x[pick // c.top_k]
    same(ops.padded_gather(c.x, c.indices, c.bin_ids, c.bins, c.padded_bins, c.top_k), want)
    rows = torch.randn_like(want)  # what lies in the padding must not count
    for weights in (None, c.weights):
        got = ops.padded_scatter(rows, c.indices, c.bin_ids, weights, c.bins, c.padded_bins, c.top_k)
        same(got, summed(c, rows, c.slots.tolist(), weights))


def binned_rows(c: Case, capacity: int) -> list[int | None]:
    """Row of each copy in [experts * capacity], None for what overflows."""
    seen = [0] * len(c.bins)
    rows: list[int | None] = []
    for e in c.bin_ids.tolist():
        rows.append(e * capacity + seen[e] if seen[e] < capacity else None)
        seen[e] += 1
    return rows


@every_case
@pytest.mark.parametrize("capacity", [0, 1, 2, 20])
def test_binned_gather_and_scatter(c: Case, capacity: int) -> None:
    row_of_copy = binned_rows(c, capacity)
    want = torch.zeros(len(c.bins) * capacity, WIDTH, dtype=torch.float64)
    for row, pick in zip(row_of_copy, c.indices.tolist()):
        if row is not None:
            want[row] = c.x[pick // c.top_k]
    shape = (len(c.bins), capacity, WIDTH)
    same(ops.binned_gather(c.x, c.indices, c.bins, capacity, c.top_k), want.view(shape))
    rows = torch.randn_like(want)
    if len(rows):
        rows[-1] = torch.nan  # a row that no pick has, in most cases: must not leak into what was dropped
    for weights in (None, c.weights):
        got = ops.binned_scatter(rows.view(shape), c.indices, weights, c.bins, c.top_k)
        same(got.nan_to_num(9.0), summed(c, rows, row_of_copy, weights).nan_to_num(9.0))


@every_case
def test_gradients(c: Case) -> None:
    x, weights = c.x.clone().requires_grad_(), c.weights.clone().requires_grad_()
    rest = (c.bins, c.top_k)
    padded = (c.bins, c.padded_bins, c.top_k)
    rows = torch.randn(len(c.indices), WIDTH, dtype=torch.float64, requires_grad=True)
    padded_rows = torch.randn(int(c.padded_bins[-1]), WIDTH, dtype=torch.float64, requires_grad=True)
    binned_rows = torch.randn(len(c.bins), 2, WIDTH, dtype=torch.float64, requires_grad=True)
    functions: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda x: ops.gather(x, c.indices, c.bin_ids, *rest), (x,)),
        (lambda x: ops.padded_gather(x, c.indices, c.bin_ids, *padded), (x,)),
        (lambda x: ops.binned_gather(x, c.indices, c.bins, 2, c.top_k), (x,)),
        (lambda y, w: ops.scatter(y, c.indices, c.bin_ids, w, *rest), (rows, weights)),
        (lambda y: ops.scatter(y, c.indices, c.bin_ids, None, *rest), (rows,)),
        (lambda y: ops.scatter(y, c.indices, c.bin_ids, c.weights, *rest), (rows,)),
        (lambda w: ops.scatter(rows.detach(), c.indices, c.bin_ids, w, *rest), (weights,)),
        (lambda y, w: ops.padded_scatter(y, c.indices, c.bin_ids, w, *padded), (padded_rows, weights)),
        (lambda y, w: ops.binned_scatter(y, c.indices, w, *rest), (binned_rows, weights)),
    ]
    for function, inputs in functions:
        if c.tokens:
            assert gradcheck(function, inputs)
        else:  # which gradcheck refuses
            grads = torch.autograd.grad(function(*inputs).sum(), inputs)
            assert [g.shape for g in grads] == [t.shape for t in inputs]
            assert not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision(dtype: torch.dtype) -> None:
    """Product in fp32, rounded; then the sum, rounded once. A weight's gradient: fp32 dot product in the dtype of x."""
    c = case(64, 2, 5)
    rows, weights = torch.randn(128, 9).to(dtype).requires_grad_(), torch.randn(128).requires_grad_()
    got = ops.scatter(rows, c.indices, c.bin_ids, weights, c.bins, 2)
    assert got.dtype == dtype
    rounded = torch.zeros(64, 2, 9)
    for row, pick in enumerate(c.indices.tolist()):
        product = rows[row].detach().float() * weights[pick].detach()
        rounded[pick // 2, pick % 2] = product.to(dtype).float()
    want = (rounded[:, 0] + rounded[:, 1]).to(dtype)
    assert torch.equal(got, want)
    unrounded = torch.zeros(64, 9, dtype=torch.float64)
    for row, pick in enumerate(c.indices.tolist()):
        unrounded[pick // 2] += (rows[row].double() * weights[pick].double()).detach()
    assert not torch.equal(unrounded.to(dtype), want)  # the data tells the two orders of rounding apart

    grad = torch.randn(64, 9).to(dtype)
    got.backward(grad)
    for row, pick in enumerate(c.indices.tolist()):
        dot = (rows[row].double() * grad[pick // 2].double()).sum()
        assert abs(weights.grad[pick] - dot) <= (rows[row].double() * grad[pick // 2].double()).abs().sum() * 2**-20 + (
            abs(dot) * torch.finfo(dtype).eps
        )
        want_row = (grad[pick // 2].float() * weights[pick].detach()).to(dtype)
        assert torch.equal(rows.grad[row], want_row)
    assert torch.equal(weights.grad, weights.grad.to(dtype).float())
    wgrad = kernels.scatter_wgrad(rows.detach(), grad, c.indices, c.bin_ids, c.bins, 2)
    assert wgrad.dtype == dtype
    assert torch.equal(wgrad.float(), weights.grad)


def test_autocast_casts_rows_and_weights() -> None:
    c = CASES["even"]
    x, weights = c.x.float().requires_grad_(), c.weights.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        rows = ops.binned_gather(x, c.indices, c.bins, 3, c.top_k)
        out = ops.binned_scatter(rows, c.indices, weights, c.bins, c.top_k)
        assert (rows.dtype, out.dtype) == (torch.bfloat16, torch.bfloat16)
        assert ops.gather(c.x, c.indices, c.bin_ids, c.bins, c.top_k).dtype == torch.float64
    out.sum().backward()
    assert (x.grad.dtype, weights.grad.dtype) == (torch.float32, torch.float32)
    cast = kernels.binned_scatter(rows, c.indices, weights.bfloat16(), c.bins, c.top_k)
    assert torch.equal(out, cast)
    # The fp32 weights would give other bits.
    assert not torch.equal(out, kernels.binned_scatter(rows, c.indices, weights, c.bins, c.top_k))


def test_kernels_take_weights_on_the_way_in() -> None:
    c = CASES["experts without tokens"]
    scaled = c.x[c.indices.long() // c.top_k] * c.weights[c.indices.long()].unsqueeze(1)
    same(kernels.gather(c.x, c.indices, c.bin_ids, c.weights, c.bins, c.top_k), scaled)
    padded = torch.zeros(int(c.padded_bins[-1]), WIDTH, dtype=torch.float64)
    padded[torch.from_numpy(c.slots)] = scaled
    args = (c.indices, c.bin_ids, c.weights, c.bins, c.padded_bins, c.top_k)
    same(kernels.padded_gather(c.x, *args), padded)
    same(kernels.padded_scatter(padded, *args), ops.padded_scatter(padded, *args))
    same(kernels.scatter(scaled, *args[:4], c.top_k), ops.scatter(scaled, *args[:4], c.top_k))
    binned = torch.zeros(len(c.bins) * 2, WIDTH, dtype=torch.float64)
    for row, copy in zip(binned_rows(c, 2), scaled):
        if row is not None:
            binned[row] = copy
    binned = binned.view(-1, 2, WIDTH)
    same(kernels.binned_gather(c.x, c.indices, c.weights, c.bins, 2, c.top_k), binned)
    dots = torch.zeros(len(c.indices), dtype=torch.float64)
    for row, pick in enumerate(c.indices.tolist()):
        dots[pick] = scaled[row] @ c.x[pick // c.top_k]
    got = kernels.padded_scatter_wgrad(padded, c.x, c.indices, c.bin_ids, c.bins, c.padded_bins, c.top_k)
    same(got, dots)
    kept = torch.zeros_like(dots)
    for row, pick, where in zip(range(len(dots)), c.indices.tolist(), binned_rows(c, 2)):
        kept[pick] = 0 if where is None else scaled[row] @ c.x[pick // c.top_k]
    same(kernels.binned_scatter_wgrad(binned, c.x, c.indices, c.bins, c.top_k), kept)
    assert (kept != dots).any()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_sort(dtype: torch.dtype) -> None:
    for n in (0, 1, 17, 300):
        x = torch.randint(-50, 200, (n,)).to(dtype)
        for end_bit in (None, 0, 3, 8, 64):
            values, indices = ops.sort(x, end_bit)
            assert (values.dtype, indices.dtype) == (dtype, dtype)
            keys = [v if end_bit in (None, 64) else v & (2**end_bit - 1) for v in x.tolist()]
            want = sorted(range(n), key=lambda i: keys[i])  # Python's sort is stable
            assert indices.tolist() == want
            assert values.tolist() == x[want].tolist() if n else values.numel() == 0


def test_sort_indices_do_not_overflow_int16() -> None:
    for n, index_dtype in ((32768, torch.int16), (32769, torch.int32), (40000, torch.int32)):
        x = torch.randint(0, 9, (n,), dtype=torch.int16)
        values, indices = ops.sort(x, 4)
        assert (values.dtype, indices.dtype) == (torch.int16, index_dtype)
        np.testing.assert_array_equal(indices.numpy(), np.argsort(x.numpy(), kind="stable"))
        assert torch.equal(x[indices.long()], values)


def test_histogram_and_cumsum() -> None:
    for n in (0, 1, 40):
        for dtype in (torch.int16, torch.int32, torch.int64):
            x = torch.randint(-2, 9, (3, n)).to(dtype)  # -2, -1, 7 and 8 are out of range
            want = [[row.count(v) for v in range(7)] for row in x.tolist()]
            assert ops.histogram(x, 7).tolist() == want
            assert ops.histogram(x[1], 7.0).tolist() == want[1]
            assert ops.histogram(x, 7).dtype == torch.int32
            inclusive = np.cumsum(x.numpy(), axis=1, dtype=np.int64)
            exclusive = inclusive - x.numpy()
            for function, sums in ((ops.inclusive_cumsum, inclusive), (ops.exclusive_cumsum, exclusive)):
                got = function(x, 1)
                assert got.dtype == dtype
                np.testing.assert_array_equal(got.numpy(), sums)
                vector = function(x[2], 5)  # the dim of a vector is not looked at
                assert vector.dtype == dtype
                assert vector.shape == (() if n == 1 else (n,))
                np.testing.assert_array_equal(vector.numpy().reshape(-1), sums[2])
    assert ops.histogram(torch.zeros(4, dtype=torch.int32), 0).shape == (0,)


@every_case
def test_operators_make_the_metadata(c: Case) -> None:
    """The calls of a MegaBlocks layer, from expert ids to bins."""
    ids = torch.empty_like(c.indices)
    ids[c.indices.long()] = c.bin_ids
    bin_ids, indices = ops.sort(ids, end_bit=3)
    counts = ops.histogram(ids, len(c.bins))
    bins = ops.inclusive_cumsum(counts, 0).view(-1)
    padded_bins = ops.inclusive_cumsum(ops.round_up(counts, BLOCK), 0).view(-1)
    for got, want in ((bin_ids, c.bin_ids), (indices, c.indices), (bins, c.bins), (padded_bins, c.padded_bins)):
        assert got.dtype == torch.int32
        assert got.tolist() == want.tolist()
    columns, rows = 3, int(padded_bins[-1]) // BLOCK
    blocks = [
        e * columns + j for e, n in enumerate(counts.tolist()) for _ in range(-(-n // BLOCK)) for j in range(columns)
    ]
    got = ops.topology(padded_bins, BLOCK, rows, columns)
    assert got.dtype == torch.int16
    assert got.tolist() == blocks


def test_topology_does_not_overflow_int16() -> None:
    padded_bins = torch.tensor([1, 3, 4], dtype=torch.int32) * 128
    got = ops.topology(padded_bins, 128, 4, 16384)
    assert got.dtype == torch.int32
    want = [e * 16384 + j for e in (0, 1, 1, 2) for j in range(16384)]
    assert got.tolist() == want
    assert ops.topology(padded_bins[:2], 128, 3, 16384).dtype == torch.int16  # 32767 fits


@every_case
def test_replicate(c: Case) -> None:
    n, experts = len(c.indices), len(c.bins)
    for dtype in (torch.float16, torch.int16, torch.int32, torch.float64):
        x = torch.randint(-99, 99, (2, experts)).to(dtype)
        got = ops.replicate(x, c.bins, n + 2)
        assert got.dtype == dtype
        assert torch.equal(got[:, :n], x[:, c.bin_ids.long()])
        assert not got[:, n:].any()
    x = torch.randn(2, experts, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: ops.replicate(x, c.bins, torch.tensor(n)), (x,))
    half = x.detach().half().requires_grad_()
    ops.replicate(half, c.bins, n).sum().backward()
    assert torch.equal(half.grad[0].double(), torch.bincount(c.bin_ids, minlength=experts).double())


def test_elementwise() -> None:
    x = torch.tensor([0, 1, 127, 128, 129], dtype=torch.int32)
    assert ops.round_up(x, 128).tolist() == [0, 128, 128, 128, 256]
    assert ops.round_up(x, 1).dtype == torch.int32
    y = torch.randn(2, 3)
    assert ops.repeat(y, (1, 1)) is y
    assert torch.equal(ops.repeat(y, torch.Size([2, 1])), torch.cat([y, y]))
    assert torch.equal(ops.sum(y), y[0] + y[1])
    assert torch.equal(ops.sum(y[:1]), y[0])
    assert torch.equal(ops.sum(y[:, :1], dim=1), y[:, 0])


def test_only_padded_gather_reads_values_on_the_host() -> None:
    """Tensors on the meta device have no values to read; on a GPU a read would make the host wait."""
    c = CASES["even"]
    meta = Case(*(v.to("meta") if isinstance(v, Tensor) else v for v in c))
    x, weights = meta.x.requires_grad_(), meta.weights.requires_grad_()
    ids, bin_ids, bins, k = meta.indices, meta.bin_ids, meta.bins, c.top_k
    rows = ops.gather(x, ids, bin_ids, bins, k)
    padded = torch.empty(32, WIDTH, dtype=torch.float64, device="meta", requires_grad=True)
    total = (
        ops.scatter(rows, ids, bin_ids, weights, bins, k)
        + ops.padded_scatter(padded, ids, bin_ids, weights, bins, meta.padded_bins, k)
        + ops.binned_scatter(ops.binned_gather(x, ids, bins, 3, k), ids, weights, bins, k)
    )
    (total.sum() + ops.replicate(x[:5, 0].view(1, 5), bins, 18).sum()).backward()
    values, indices = ops.sort(bin_ids, 3)
    counts = ops.inclusive_cumsum(ops.round_up(ops.histogram(bin_ids, 5), 4), 0)
    blocks = ops.topology(counts, 4, 8, 2)
    with pytest.raises(RuntimeError, match="meta"):
        ops.padded_gather(x, ids, bin_ids, bins, meta.padded_bins, k)
    shapes = [tuple(t.shape) for t in (x.grad, weights.grad, padded.grad, values, indices, blocks)]
    assert shapes == [(9, WIDTH), (18,), (32, WIDTH), (18,), (18,), (16,)]


def test_errors_name_the_argument() -> None:
    c = CASES["even"]
    zero_dim = torch.tensor(18, dtype=torch.int32)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("x.shape", lambda: ops.gather(c.x[1:], c.indices, c.bin_ids, c.bins, c.top_k)),
        ("x.dtype", lambda: ops.gather(c.x.int(), c.indices, c.bin_ids, c.bins, c.top_k)),
        ("indices.shape", lambda: ops.gather(c.x, c.indices[1:], c.bin_ids, c.bins, c.top_k)),
        ("weights.shape", lambda: ops.scatter(c.x, c.indices[:9], c.bin_ids, c.weights, c.bins, 1)),
        ("bins.shape", lambda: ops.binned_gather(c.x, c.indices, zero_dim, 2, c.top_k)),
        ("padded_bins.shape", lambda: ops.padded_gather(c.x, c.indices, c.bin_ids, c.bins, c.bins[:2], 2)),
        ("x.shape", lambda: ops.binned_scatter(c.x.view(3, 3, WIDTH), c.indices, None, c.bins, 2)),
        ("x.dtype", lambda: ops.sort(c.x[0])),
        ("end_bit", lambda: ops.sort(c.indices, -1)),
        ("x.dtype", lambda: ops.histogram(c.x, 3)),
        ("dim", lambda: ops.inclusive_cumsum(c.indices.view(2, 9), 0)),
        ("x.dtype", lambda: ops.round_up(c.indices.long(), 4)),
        ("bins.shape", lambda: ops.replicate(c.x, c.bins, 4)),
        ("padded_bins.dtype", lambda: ops.topology(c.bins.long(), 4, 1, 1)),
    ]
    for field, call in calls:
        with pytest.raises(ConfigError, match=f"^{field} is .* must be "):
            call()
