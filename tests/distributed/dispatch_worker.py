"""One rank of test_dispatch.py: layers with their experts spread over ranks, every case in one launch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dispatch_cases import Case, D, actual, differences, expected, spread
from dispatch_no_expert import picks_of_no_expert
from dispatch_tensor_parallel import width_over_ranks
from exchange_worker import logged
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dmoe.errors import ConfigError
from dmoe.moe import MoE
from dmoe.moe.dispatch import AllToAllDispatcher
from dmoe.moe.router import Routing
from dmoe.ops.collectives import leave_process_group

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
LOSSES = {"aux_loss_coef": 0.1, "z_loss_coef": 0.01}
UNEVEN = {2: [7, 12], 4: [6, 9, 0, 4]}


def check(case: Case, tolerance: float, group: dist.ProcessGroup, exact: tuple[str, ...] = ()) -> None:
    """Compare with the plain layer; `exact` names tensors, or beginnings of names, that must have the same bits."""
    got, want = actual(case, group), expected(case, group)
    for name, difference in differences(got, want).items():
        limit = 0.0 if exact and name.startswith(exact) else tolerance
        assert difference <= limit, (name, difference, case)
    assert got.stats.tokens_per_expert == want.stats.tokens_per_expert, case
    for name in ("aux_loss", "z_loss", "router_entropy"):
        assert getattr(got.stats, name) == pytest.approx(getattr(want.stats, name), rel=max(tolerance, 1e-12)), name
    everywhere: list[Any] = [None] * group.size()
    dist.all_gather_object(everywhere, got.stats, group=group)
    assert all(stats == everywhere[0] for stats in everywhere), "statistics differ between ranks"


def against_the_plain_layer(group: dist.ProcessGroup) -> None:
    world = group.size()
    tokens = [UNEVEN[world], [3] * (world - 1) + [0], [0] * world, [1] + [0] * (world - 2) + [90]]
    shapes = [(4, 1), (4, 2), (6, 2), (6, 6), (8, 3)] if world == 2 else [(4, 1), (8, 2), (8, 8)]
    kinds: list[dict[str, Any]] = [
        {"shared_intermediate_size": 16},
        {"gated": False, "bias": True, "activation": "relu2"},
        {"bias": True, "shared_intermediate_size": 8, "score_function": "sigmoid", "routed_scaling_factor": 2.0},
    ]
    rounded = [(FP32, False, 1e-5), (BF16, False, 0.03), (FP32, True, 0.03)]
    number = 0
    for num_experts, top_k in shapes:
        for kind in kinds:
            for skew in ("", "one", "none")[: 3 if top_k < num_experts else 2]:
                config = {"num_experts": num_experts, "top_k": top_k, **LOSSES, **kind}
                case = Case(tokens[number % 4], FP64, skew, config=config)
                check(case, 1e-12, group)
                dtype, autocast, tolerance = rounded[number % 3]
                check(dataclasses.replace(case, dtype=dtype, autocast=autocast), tolerance, group)
                number += 1
    check(Case(tokens[0], FP64, training=False, config={"shared_intermediate_size": 16}), 1e-12, group)


def same_bits(group: dist.ProcessGroup) -> None:
    """In fp32 the output and the gradients of the experts are those of the plain layer to the last bit.

    The routing must be so too, so that this is without a shared expert and attached losses, whose products and sums run
    over other tokens. The reference backend adds picks in another order from K = 5 on.
    """
    for backend in ("torch", "reference"):
        for num_experts, top_k in ((4, 1), (4, 4), (8, 2)):
            for kind in ({"gated": False, "bias": True}, {"bias": True}):
                for skew in ("", "one", "none")[: 3 if top_k < num_experts else 2]:
                    config = {"num_experts": num_experts, "top_k": top_k, "backend": backend, **kind}
                    case = Case(UNEVEN[group.size()], FP32, skew, config=config)
                    check(case, 1e-5, group, exact=("y", "experts."))


def payloads(group: dist.ProcessGroup) -> None:
    """Rounded rows change the result by no more than their rounding, and nothing in the routing."""
    config = {"shared_intermediate_size": 16, **LOSSES}
    for payload, tolerance in (("bf16", 0.02), ("fp8", 0.15)):
        case = Case(UNEVEN[group.size()], FP32, payload=payload, config=config)
        check(case, tolerance, group)
        check(dataclasses.replace(case, autocast=True), tolerance, group)
        got, want = actual(case, group), expected(case, group)
        difference = differences(got, want)
        assert not difference["y"] or difference["y"] > 1e-4, "nothing was rounded"
    # Rows in bf16 lose nothing when they are sent in bf16.
    case = Case(UNEVEN[group.size()], BF16, config=config)
    same, rounded = actual(case, group), actual(dataclasses.replace(case, payload="bf16"), group)
    assert max(differences(rounded, same).values()) == 0


def tokens_once(group: dist.ProcessGroup) -> None:
    """A token sent once to each rank: the plain layer's numbers but for their rounding, over every kind of batch."""
    world = group.size()
    tokens = [UNEVEN[world], [3] * (world - 1) + [0], [0] * world, [1] + [0] * (world - 2) + [90]]
    kinds: list[dict[str, Any]] = [
        {"shared_intermediate_size": 16, "bias": True, **LOSSES},
        {"capacity_factor": 1.0, "gated": False, "activation": "relu2"},
    ]
    rounded = [(FP32, False, 1e-5), (BF16, False, 0.03), (FP32, True, 0.03)]
    number = 0
    for num_experts, top_k in ((4, 2), (8, 8), (12, 3)):
        for kind in kinds[: 1 if top_k == num_experts else 2]:
            for skew in ("", "one", "none")[: 3 if top_k < num_experts else 2]:
                config = {"num_experts": num_experts, "top_k": top_k, **kind}
                # A capacity counts the tokens of a rank, so only one rank may have any.
                few = [0] * (world - 1) + [17] if "capacity_factor" in kind else tokens[number % 4]
                case = Case(few, FP64, skew, sends="tokens", config=config)
                check(case, 1e-12, group)
                dtype, autocast, tolerance = rounded[number % 3]
                check(dataclasses.replace(case, dtype=dtype, autocast=autocast), tolerance, group)
                number += 1
    same = Case(UNEVEN[world], FP32, sends="tokens", config={"num_experts": 4, "top_k": 1})
    check(same, 1e-5, group, exact=("y", "experts."))  # a pick is a token
    check(Case(UNEVEN[world], FP32, payload="fp8", sends="tokens", config=kinds[0]), 0.15, group)
    again = Case(UNEVEN[world], FP32, sends="tokens", config={"num_experts": 8, "top_k": 3})
    assert max(differences(actual(again, group), actual(again, group)).values()) == 0
    case = Case([64] * world, FP32, config={"num_experts": 8, "top_k": 8})
    rows = {}
    for sends in ("picks", "tokens"):
        taken: list[int] = []
        hook = {"call": lambda layer, taken=taken: counting(layer, taken)}
        actual(dataclasses.replace(case, sends=sends, **hook), group)
        rows[sends] = taken
    assert rows == {"picks": [64 * 8], "tokens": [64 * world]}, rows


class Saved:
    """Bytes that autograd keeps, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.hooks.__exit__(*args)


def bounded_rows(group: dist.ProcessGroup) -> None:
    world = group.size()
    config = {"shared_intermediate_size": 16, "bias": True, **LOSSES}
    for tokens, skew in (([25] * world, ""), ([25] * world, "one"), (UNEVEN[world], "one"), ([0] * world, "")):
        for dtype, bounds in ((FP64, (world, 30)), (FP32, (9, 10**6))):
            case = Case(tokens, dtype, skew, config=config)
            want = actual(case, group)
            for bound in bounds:
                taken: list[int] = []
                hook = {"call": lambda layer, taken=taken: counting(layer, taken)}
                got = actual(dataclasses.replace(case, max_rows=bound, **hook), group)
                assert max(taken) <= bound, (taken, bound)
                limit = 1e-12 if dtype == FP64 else 1e-5
                assert max(differences(got, want).values()) <= limit, (bound, differences(got, want))
                assert got.stats == want.stats
                everywhere: list[Any] = [None] * world
                dist.all_gather_object(everywhere, len(taken))
                assert len(set(everywhere)) == 1, "ranks took different numbers of chunks"
                assert len(taken) > 2 or bound > 9 or not sum(tokens)
    with pytest.raises(ConfigError, match=f"max_rows is 1: must be 0, or at least the {world} ranks"):
        AllToAllDispatcher(group, world, max_rows=1)
    with pytest.raises(ConfigError, match=rf"num_experts is {world + 1}: must be divisible by the {world} ranks"):
        AllToAllDispatcher(group, world + 1)


def any_bound_gives_the_same_bits(group: dist.ProcessGroup) -> None:
    """Of the dispatcher alone, with experts that multiply by a number: a matrix product may round a row otherwise when
    it has other rows beside it (MKL does, below about 16 rows)."""
    world, num_experts, top_k = group.size(), 8, 3
    generator = torch.Generator().manual_seed(group.rank())
    table_ED = torch.randn(num_experts, D, generator=torch.Generator().manual_seed(7))
    own_eD = table_ED.chunk(world)[group.rank()]

    def multiply(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, table_ED: Tensor) -> Tensor:
        parts = [x_TD * table_ED[ids_TK[:, k]] * weights_TK[:, k, None] for k in range(ids_TK.shape[1])]
        return sum(parts[1:], parts[0])

    for num_tokens in (UNEVEN[world][group.rank()], 60):
        x, grad = torch.randn(2, num_tokens, D, generator=generator)
        weights, ids = torch.rand(num_tokens, num_experts, generator=generator).pow(3).topk(top_k)
        results = []
        for max_rows in (0, world, 9, 64, 1000):
            dispatcher = AllToAllDispatcher(group, num_experts, max_rows=max_rows)
            leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
            routing = Routing(ids, leaves[1], leaves[1], leaves[1])
            y = dispatcher(leaves[0], routing, lambda x, i, w: multiply(x, i, w, own_eD), None)
            y.backward(grad)
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        assert torch.equal(results[0][0], multiply(x, ids, weights, table_ED))
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


def counting(layer: MoE, taken: list[int]) -> MoE:
    layer.experts.register_forward_pre_hook(lambda _, args: taken.append(args[0].shape[0]))
    return layer


def saved_bytes_do_not_grow_with_skew(group: dist.ProcessGroup) -> None:
    """The last rank receives everything of a skewed batch; what is kept is what it keeps of a balanced one."""
    tokens = [64] * group.size()
    config = {"num_experts": 4, "top_k": 1}
    kept = {}
    for skew, max_rows in (("", 0), ("one", 0), ("", 32), ("one", 32), ("one", 8)):
        case = Case(tokens, FP32, skew, config=config)
        layer = spread(case.full_layer(), group, max_rows=max_rows)
        with Saved() as saved:
            y = layer(case.batch()[0][group.rank()].requires_grad_())
        y.sum().backward()
        kept[skew, max_rows] = sum(saved.storages.values())
    if group.rank() == group.size() - 1:
        assert kept["one", 0] > 1.3 * kept["", 0], kept  # the unbounded one does grow
        assert kept["one", 32] <= 1.05 * kept["", 32], kept
        assert kept["one", 8] <= 1.05 * kept["", 32], kept


def recomputed(group: dist.ProcessGroup) -> None:
    """Under activation checkpointing, chunks inside or not: the plain layer's numbers, and nothing left waiting."""
    for max_rows in (0, 9):
        config = {"shared_intermediate_size": 16, **LOSSES}
        case = Case(UNEVEN[group.size()], FP64, "one", max_rows=max_rows, config=config)
        case.call = lambda layer: lambda x: checkpoint(layer, x, use_reentrant=False)
        check(case, 1e-12, group)
        assert_nothing_waits()


def weighed_input(group: dist.ProcessGroup) -> None:
    """Rows are weighed before they travel. SparseMixer's choice in evaluation, which draws nothing."""
    world, shared = group.size(), {"shared_intermediate_size": 16, "bias": True, "weigh_input": True, **LOSSES}
    sigmoid = {"score_function": "sigmoid", "norm_topk_prob": False}
    padded = {"pad_to_capacity": True, "capacity_factor": 8.0}
    for dtype, tolerance in ((FP64, 1e-12), (BF16, 0.03)):
        for tokens, skew, config in (
            (UNEVEN[world], "one", {"top_k": 1, **sigmoid}),
            (UNEVEN[world], "", {"top_k": 3, **sigmoid}),
            ([0] * (world - 1) + [5], "", {"top_k": 2}),
            ([5] * world, "", {"top_k": 2, **sigmoid, **padded}),
        ):
            check(Case(tokens, dtype, skew, config={**shared, **config}), tolerance, group)
    check(Case(UNEVEN[world], FP64, max_rows=9, config={**shared, **sigmoid}), 1e-12, group)
    config = {"routing": "sparsemixer", "norm_topk_prob": False, "sparsemixer_eps": 0.2}
    check(Case(UNEVEN[world], FP64, training=False, config=config), 1e-12, group)


def assert_nothing_waits() -> None:
    assert torch._C._distributed_c10d._get_work_registry_size() == 0


class Synchronisations(TorchDispatchMode):
    """Counts what reads a tensor on the host, and collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.collectives: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.reads += any(part in name for part in ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal"))
        if name.startswith("_c10d_functional") and "_wrap" not in name and "wait" not in name:
            self.collectives.append(name.split(".")[1])
        return func(*args, **(kwargs or {}))


@contextmanager
def counting_tolist(counts: list[int]) -> Iterator[None]:
    """`tolist` reads the memory of a CPU tensor without an operator; on a GPU it is one synchronisation."""
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        counts.append(tensor.numel())
        return tolist(tensor)

    Tensor.tolist = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.tolist = tolist  # type: ignore[method-assign]


def one_synchronisation(group: dist.ProcessGroup) -> None:
    """fp32, where the expert computation reads nothing on the CPU."""
    config = {"shared_intermediate_size": 16, "backend": "torch"}
    for max_rows in (0, 10**6):
        case = Case(UNEVEN[group.size()], FP32, max_rows=max_rows, config=config)
        layer = spread(case.full_layer(), group, max_rows=max_rows)
        x = case.batch()[0][group.rank()].requires_grad_()
        tolist: list[int] = []
        with counting_tolist(tolist), Synchronisations() as forward:
            y = layer(x)
        with counting_tolist(tolist), Synchronisations() as backward:
            y.sum().backward()
        assert len(tolist) == 1, tolist
        assert forward.reads == backward.reads == 0
        counts = "all_gather_into_tensor" if max_rows else "all_to_all_single"
        assert forward.collectives == [counts, "all_to_all_single", "all_to_all_single"], forward.collectives
        assert backward.collectives == ["all_to_all_single"] * 2


def shared_expert_runs_meanwhile(group: dist.ProcessGroup) -> None:
    for changes in ({}, {"weigh_input": True, "top_k": 1}):
        case = Case(UNEVEN[group.size()], FP32, config={"shared_intermediate_size": 16, **changes})
        layer, log = spread(case.full_layer(), group), []
        assert layer.shared_experts is not None
        layer.shared_experts.up_proj.register_forward_hook(lambda *_, log=log: log.append("shared"))
        layer.shared_experts.up_proj.register_full_backward_hook(lambda *_, log=log: log.append("shared"))
        layer.experts.register_forward_hook(lambda *_, log=log: log.append("experts"))
        layer.experts.register_full_backward_hook(lambda *_, log=log: log.append("experts"))
        x = case.batch()[0][group.rank()].requires_grad_()
        want = ["send", "shared", "wait", "experts", "send", "wait"]
        with logged(log):
            y = layer(x)
            assert log == want, log
            log.clear()
            y.sum().backward()
            assert log == ["send", "wait", "experts", "send", "shared", "wait"], log


def frozen(group: dist.ProcessGroup) -> None:
    """Frozen experts, a frozen router, tokens without a gradient."""
    for freeze in ("experts", "router", "x"):
        case = Case(UNEVEN[group.size()], FP64, config={"shared_intermediate_size": 16, **LOSSES})
        x, grads = case.batch()
        full = case.full_layer()
        layers = full, spread(full, group)
        outputs = []
        for layer, inputs, grad in zip(
            layers, (torch.cat(x), x[group.rank()]), (torch.cat(grads), grads[group.rank()])
        ):
            if freeze != "x":
                getattr(layer, freeze).requires_grad_(False)
            leaf = inputs.clone().requires_grad_(freeze != "x")
            layer(leaf).backward(grad)
            outputs.append(leaf.grad)
        if freeze == "x":
            want = layers[0].experts.down_proj.grad.chunk(group.size())[group.rank()]
            torch.testing.assert_close(layers[1].experts.down_proj.grad, want, rtol=1e-12, atol=1e-12)
        else:
            assert next(getattr(layers[1], freeze).parameters()).grad is None
            want = outputs[0].split(case.tokens)[group.rank()]
            torch.testing.assert_close(outputs[1], want, rtol=1e-12, atol=1e-12)


def without_gradients(group: dist.ProcessGroup) -> None:
    case = Case(UNEVEN[group.size()], FP64, "one", config=LOSSES)
    for max_rows in (0, 9):
        layer = spread(case.full_layer(), group, max_rows=max_rows)
        with torch.no_grad():
            y = layer(case.batch()[0][group.rank()])
        want = case.full_layer()(torch.cat(case.batch()[0])).split(case.tokens)[group.rank()]
        torch.testing.assert_close(y, want.detach(), rtol=1e-12, atol=1e-12)
    assert_nothing_waits()


CASES = (
    against_the_plain_layer,
    same_bits,
    payloads,
    tokens_once,
    bounded_rows,
    any_bound_gives_the_same_bits,
    picks_of_no_expert,
    saved_bytes_do_not_grow_with_skew,
    recomputed,
    weighed_input,
    one_synchronisation,
    shared_expert_runs_meanwhile,
    frozen,
    without_gradients,
    width_over_ranks,
)


def rank_main(rank: int, world: int, store_path: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None
    assert D % world == 0
    for case in CASES:
        case(group)
    dist.barrier()
    leave_process_group()
