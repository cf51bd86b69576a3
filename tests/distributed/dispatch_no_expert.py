"""Picks of no expert (id E) between ranks: for dispatch_worker.py, and dispatch_compile_worker.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.moe.dispatch import AllToAllDispatcher
from dmoe.moe.router import Routing

D, E, K = 32, 8, 3
Dispatched = Callable[[Tensor, Tensor, Tensor], Tensor]
NAN = float("nan")


def table() -> Tensor:
    """[E, D]: experts that multiply by a number, so that nothing is rounded otherwise among other rows."""
    return torch.randn(E, D, generator=torch.Generator().manual_seed(7))


def dropped_batch(group: dist.ProcessGroup, kind: str, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, ids, weights and the output's gradient; what is of no expert is NaN."""
    generator = torch.Generator().manual_seed(group.rank() + 3)
    x, grad = torch.randn(2, num_tokens, D, generator=generator)
    weights, ids = torch.rand(num_tokens, E, generator=generator).topk(K)
    lost = torch.rand(ids.shape, generator=generator) < 0.3
    lost[:2] = True
    if kind == "all" or (kind == "all of one rank" and group.rank() == 0):
        lost[:] = True
    if kind == "none":
        lost[:] = False
    if kind == "one expert":
        lost = ids == E - 1
    without_expert = lost.all(dim=1, keepdim=True)
    x, grad = x.masked_fill(without_expert, NAN), grad.masked_fill(without_expert, NAN)
    return x, ids.masked_fill(lost, E), weights.masked_fill(lost, NAN), grad


def results(call: Dispatched, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = call(leaves[0], ids, leaves[1])
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def expected(x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    """Pick by pick, in the order of k."""
    scales_ED = table()
    y, x_grad, weights_grad = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    for t, k in torch.cartesian_prod(torch.arange(len(x)), torch.arange(K)).tolist():
        if (e := int(ids[t, k])) < E:
            y[t] += x[t] * scales_ED[e] * weights[t, k]
            x_grad[t] += grad[t] * weights[t, k] * scales_ED[e]
            weights_grad[t, k] = (grad[t] * (x[t] * scales_ED[e])).sum()
    return [y, x_grad, weights_grad]


def dispatched(group: dist.ProcessGroup, taken: list[int] | None = None, **options: object) -> Dispatched:
    dispatcher = AllToAllDispatcher(group, E, **options)  # type: ignore[arg-type]
    own_eD = table().chunk(group.size())[group.rank()]

    def experts(x_SD: Tensor, ids_S1: Tensor, weights_S1: Tensor) -> Tensor:
        if taken is not None:
            taken.append(x_SD.shape[0])
        return x_SD * own_eD[ids_S1[:, 0]] * weights_S1

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return dispatcher(x, Routing(ids, weights, weights, weights), experts, None)

    return call


def rows_for_this_rank(group: dist.ProcessGroup, ids: Tensor) -> int:
    everywhere: list[Tensor] = [torch.empty(0)] * group.size()
    dist.all_gather_object(everywhere, ids, group=group)
    own = E // group.size() * group.rank()
    return sum(int(((i >= own) & (i < own + E // group.size())).sum()) for i in everywhere)


def picks_of_no_expert(group: dist.ProcessGroup) -> None:
    """In one exchange, in chunks and rounded: only rows of experts travel, and the others leave no trace."""
    for kind in ("none", "some", "one expert", "all of one rank", "all"):
        batch = dropped_batch(group, kind, [17, 20, 5, 9][group.rank()])
        want, rows = expected(*batch), rows_for_this_rank(group, batch[1])
        for max_rows, payload in ((0, "same"), (9, "same"), (1000, "same"), (0, "bf16"), (0, "fp8")):
            taken: list[int] = []
            got = results(dispatched(group, taken, max_rows=max_rows, payload=payload), *batch)
            if max_rows != 9:
                assert taken == [rows], (kind, taken, rows)
            tolerance = {"same": 1e-6, "bf16": 0.02, "fp8": 0.1}[payload]
            for value, wanted in zip(got, want, strict=True):
                assert value.isfinite().all(), (kind, max_rows, payload)
                limit = tolerance * wanted.abs().max().clamp_min(1e-3)
                assert (value - wanted).abs().max() <= limit, (kind, max_rows, payload)
            if payload == "same":
                assert torch.equal(got[0], want[0]), (kind, max_rows)


def compiled_picks_of_no_expert(group: dist.ProcessGroup) -> None:
    torch.compiler.reset()
    call = dispatched(group)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for kind in ("some", "all of one rank", "all", "none"):
        batch = dropped_batch(group, kind, 11 + group.rank())
        got, want = results(compiled, *batch), results(call, *batch)
        assert all(map(torch.equal, got, want)), kind
