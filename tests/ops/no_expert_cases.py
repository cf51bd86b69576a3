"""Picks of no expert in the Triton kernels: sorting, rows, the whole backend, and that of few tokens.

Run as `expert_kernel_cases.py` is, whose settings fill fresh memory with NaN.
"""

from typing import Any

import pytest
import torch
from dense_oracle import make_problem, relative_error
from expert_kernel_cases import (  # noqa: F401
    BACKENDS,
    IN_INTERPRETER,
    MAIN_DTYPE,
    TOLERANCE,
    gradients,
    on_device,
    poison,
    setting,
)
from interpreted import DEVICE
from no_expert import KINDS, drop, dropped_gradient, gradients_with_drops, kept
from torch import Tensor

from dmoe.ops import expert_mlp, sort_by_expert, triton_experts
from dmoe.ops.kernels import fp8 as fp8_kernels
from dmoe.ops.kernels import sorting
from dmoe.ops.kernels.decode import GROUPED, PER_TOKEN, DecodeTile, DecodeTiles, decode_mlp
from dmoe.ops.kernels.rows import spread_rows, sum_picks_triton
from dmoe.ops.kernels.sorting import counting_sort

SHAPES: dict[str, dict[str, Any]] = {
    "gated": {"T": 25, "D": 40, "F": 40, "E": 4, "K": 2, "bias": True},
    "plain": {"T": 14, "D": 24, "F": 40, "E": 7, "K": 3, "gated": False, "bias": True},
    "one expert": {"T": 20, "E": 1, "K": 1, "bias": True},
    "one token": {"T": 1, "E": 4, "K": 4},
    "no token": {"T": 0, "bias": True},
    "odd widths": {"T": 8, "D": 20, "F": 5, "E": 16, "K": 2, "bias": True},
}
FEW = {
    "plain": ("some", "one expert"),
    "one token": ("some", "one expert"),
    "no token": ("all",),
    "odd widths": ("some",),
    "one expert": ("some",),
}
PAIRS = [(shape, kind) for shape in SHAPES for kind in FEW.get(shape, KINDS)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "kind"), PAIRS)
def test_values_and_gradients_without_some_picks(shape: str, kind: str, backend: str) -> None:
    dirty, clean = drop(make_problem(**SHAPES[shape], dtype=MAIN_DTYPE), kind)
    grad = dropped_gradient(dirty, float("nan"))
    want_y, want = gradients_with_drops(clean, grad.nan_to_num(0))
    y, got = gradients(dirty, backend, grad)
    assert relative_error(y.cpu(), want_y) <= TOLERANCE[MAIN_DTYPE]
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name].cpu(), want[name]) <= TOLERANCE[MAIN_DTYPE], name
    lost = dirty.topk_ids == dirty.down.shape[0]
    assert (got["topk_weights"].cpu()[lost] == 0).all()
    assert (y.cpu()[lost.all(dim=1)] == 0).all()


def test_tiles_cover_the_rows_of_experts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def noted(offsets: Tensor, num_rows: int, block_m: int) -> Any:
        tiles = row_tiles(offsets, num_rows, block_m)
        counts = torch.diff(offsets.cpu(), prepend=torch.zeros(1, dtype=torch.int32))
        used.append((int(tiles.used_1), sum(-(-int(n) // block_m) for n in counts), int(offsets[-1])))
        return tiles

    row_tiles = triton_experts.row_tiles
    monkeypatch.setattr(triton_experts, "row_tiles", noted)
    dirty, _ = drop(make_problem(T=70, D=16, E=3, K=2, dtype=MAIN_DTYPE), "some")
    gradients(dirty, "triton", torch.zeros_like(dirty.x))
    assert len(used) == 2  # forward and backward
    for tiles, want, rows in used:
        assert tiles == want
        assert rows == kept(dirty) < 140


@pytest.mark.parametrize("kind", ["some", "all", "none"])
def test_rows_of_no_expert_take_no_memory_where_their_number_is_known(kind: str) -> None:
    dirty, _ = drop(make_problem(T=25, D=40, F=40, E=4, K=2, bias=True, dtype=MAIN_DTYPE), kind)
    inputs = [t.to(DEVICE) for t in dirty.tensors()]
    grad = torch.randn_like(inputs[0]).nan_to_num()
    results = []
    for num_rows in (None, kept(dirty)):
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        x, ids, weights, gate_up, down, gate_up_bias, down_bias = leaves
        with Rows() as rows:
            y = expert_mlp(
                x, ids, weights, gate_up, down, gate_up_bias, down_bias, backend="triton", num_rows=num_rows
            )  # fmt: skip
            y.backward(grad)
        results.append([y.detach(), *(t.grad for t in leaves if t.requires_grad)])
        assert rows.kept == (50 if num_rows is None else num_rows)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


class Rows:
    """How many rows the pre-activation that is kept for the backward has."""

    kept = 0

    def __enter__(self) -> "Rows":
        def note(tensor: Tensor) -> Tensor:
            if tensor.dim() == 2 and tensor.shape[1] == 80:
                self.kept = tensor.shape[0]
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.hooks.__exit__(*args)


SORTS = [(40, 2, 7, "some"), (1, 3, 3, "one expert"), (33, 1, 64, "some"), (33, 1, 1, "all"), (20, 4, 16, "some"),
         (20, 4, 16, "none")]  # fmt: skip


@pytest.mark.parametrize(("T", "K", "E", "kind"), SORTS)
def test_sort_of_picks_of_no_expert(T: int, K: int, E: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block and in several; numbers of experts that fill a power of two among them."""
    monkeypatch.setattr(sorting, "_BLOCKS_AT_ONCE", 2)
    dirty, _ = drop(make_problem(T=T, E=E, K=K), kind)
    ids, N = dirty.topk_ids, kept(dirty)
    want = sort_by_expert(ids, E)
    for dtype, block in ((torch.int64, 32), (torch.int32, 256)):
        poison()
        order, inverse, offsets = (t.cpu() for t in counting_sort(ids.to(DEVICE, dtype), E, block=block))
        assert torch.equal(order[:N].long(), want.order_R[:N])
        assert ((order >= 0) & (order < T * K)).all()
        assert torch.equal(inverse.long(), want.inverse_TK)
        assert torch.equal(offsets, want.offsets_E)


def test_rows_of_picks_of_no_expert() -> None:
    dirty, _ = drop(make_problem(T=20, E=4, K=3), "some")
    ids, N = dirty.topk_ids, kept(dirty)
    inverse = counting_sort(ids.to(DEVICE), 4).inverse_TK
    x, rows = torch.randn(20, 24, device=DEVICE), torch.full((60, 24), float("nan"), device=DEVICE)
    rows[:N] = torch.randn(N, 24, device=DEVICE)
    want = torch.zeros(20, 24, device=DEVICE)
    for k in range(3):
        has_row = ids[:, k] < 4
        want[has_row] += rows[inverse[has_row, k].long()]
    assert torch.equal(sum_picks_triton(rows, inverse), want)
    out = torch.full((60, 24), float("nan"), device=DEVICE)
    spread_rows(x, inverse, out=out)
    order = sort_by_expert(ids, 4).order_R[:N].to(DEVICE)
    assert torch.equal(out[:N], x[order // 3])
    assert out[N:].isnan().all()


def test_rounding_and_activations_of_picks_of_no_expert() -> None:
    if not IN_INTERPRETER and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs 8-bit numbers")
    dirty, _ = drop(make_problem(T=20, D=32, E=4, K=3), "some")
    N = kept(dirty)
    order, inverse, offsets = counting_sort(dirty.topk_ids.to(DEVICE), 4)
    x, experts = torch.randn(20, 32, device=DEVICE), dirty.topk_ids.flatten().to(DEVICE)[order.long()]
    values, scales = fp8_kernels.quantise_rows(x, inverse)
    want_values, want_scales = fp8_kernels.quantise_rows(x)
    tokens = order[:N].long() // 3
    assert torch.equal(values[:N].view(torch.uint8), want_values.view(torch.uint8)[tokens])
    assert torch.equal(scales[:N], want_scales[tokens])

    h, weights = torch.randn(60, 64, device=DEVICE), torch.rand(60, 1, device=DEVICE)
    bias, grad = torch.randn(4, 64, device=DEVICE), torch.randn(60, 32, device=DEVICE)
    got_h, want_h = h.clone(), h[:N].clone()
    got = fp8_kernels.activate_rows(got_h, bias, experts, weights, "relu", True, offsets)
    want = fp8_kernels.activate_rows(want_h, bias, experts[:N], weights[:N], "relu", True)
    back = fp8_kernels.activate_backward_rows(grad, h, weights, "relu", True, offsets)
    want_back = fp8_kernels.activate_backward_rows(grad[:N], h[:N], weights[:N], "relu", True)
    for g, w in zip((got_h, *got, *back), (want_h, *want, *want_back), strict=True):
        assert torch.equal(g[:N].float(), w.float())
    assert torch.equal(got_h[N:], h[N:])
    if IN_INTERPRETER:  # what was not written is still what fresh memory was filled with
        assert got[1][N:].isnan().all()
        assert back[2][N:].isnan().all()


def _tiles(way: str) -> DecodeTiles:
    if not IN_INTERPRETER:
        return PER_TOKEN if way == "per token" else GROUPED[16]
    tile = DecodeTile(16, 16, 4, 1)
    return DecodeTiles(0 if way == "per token" else 16, tile, tile)


FEW_TOKENS: dict[str, dict[str, Any]] = {
    "gated": {"T": 5, "D": 40, "F": 20, "E": 5, "K": 3, "bias": True},
    "every expert chosen": {"T": 3, "D": 16, "F": 8, "E": 4, "K": 4, "gated": False},
    "one token": {"T": 1, "E": 16, "K": 2, "bias": True},
}


@pytest.mark.parametrize("kind", ["some", "one expert", "all"])
@pytest.mark.parametrize("way", ["per token", "grouped"])
@pytest.mark.parametrize("shape", FEW_TOKENS)
def test_few_tokens(shape: str, way: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values, no weight of an expert that nothing chose, and no activation of a pick of no expert."""
    dtype = torch.float32 if IN_INTERPRETER else MAIN_DTYPE
    dirty, clean = drop(make_problem(**FEW_TOKENS[shape], dtype=dtype), kind)
    want, _ = gradients_with_drops(clean, torch.zeros_like(clean.x))
    dirty = dirty if kind == "some" else clean  # without NaN of their own, that what is computed is a number
    unchosen = [e for e in range(len(dirty.down)) if not (dirty.topk_ids == e).any()]
    dirty.gate_up[unchosen] = dirty.down[unchosen] = float("nan")
    q, _ = on_device(dirty, ())
    made, new_empty = [], Tensor.new_empty

    def noted(t: Tensor, *size: Any, **options: Any) -> Tensor:
        fresh = new_empty(t, *size, **options)
        if fresh.is_floating_point():
            made.append(fresh.fill_(float("nan")))
        return fresh

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", noted)
        y = decode_mlp(*q.tensors(), q.activation, tiles=_tiles(way))  # type: ignore[arg-type]
    assert relative_error(y.cpu(), want) <= TOLERANCE[dtype]
    assert made[0].isnan().all(dim=1).sum() == dirty.topk_ids.numel() - kept(dirty)  # the activation
