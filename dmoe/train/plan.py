"""What a run would need on each rank, found by running a step of it on tensors without memory.

The real parts of the model are laid out over a fake process group of any number of ranks, and the real training step
runs on fake tensors: memory and messages are measured, not computed from formulas. What is assumed: the routing is
balanced (or all tokens go to the experts of this rank), because fake tensors have no values; and where a step has many
micro-batches few are run, since what each adds is the same: sums are continued linearly.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dmoe.config import V_SCHEDULES, ParallelConfig, RunConfig, require
from dmoe.lora import check_trainable, make_trainable
from dmoe.moe import moe_layers
from dmoe.moe.dispatch import AllToAllDispatcher
from dmoe.moe.dispatch_tokens import TokenDispatcher
from dmoe.moe.router import Routing
from dmoe.moe.sharded import local
from dmoe.observe.memory.account import account_of, following_step
from dmoe.observe.memory.accounting import MemoryTimeline
from dmoe.observe.memory.categories import ACTIVATIONS, CAST, EXCHANGE, LOGITS, WORKSPACES
from dmoe.parallel import ParallelMesh, build_mesh, check_model, parallelize, resolve
from dmoe.parallel.traffic import TrafficCounter
from dmoe.train.device import autocast
from dmoe.train.engine import Batch, Engine
from dmoe.train.optim import build_optimizer
from dmoe.train.plan_operators import CUDA_WORKSPACES, as_on, operators
from dmoe.train.step import training_step

_ALL_FORWARDS_FIRST = ("gpipe", "looped_bfs")
"""Pipeline schedules that keep the activations of all micro-batches."""


@dataclass(frozen=True)
class RankPlan:
    """One rank; the first of its pipeline stage, which holds the largest parts where something does not divide.

    All sizes are bytes. Ranks of one stage differ by rounding, and by what is routed to them.
    """

    rank: int
    pipeline_rank: int
    parameters: dict[str, int]
    """Elements that this rank holds: "dense", "experts", "embeddings" (with the head)."""
    peak: dict[str, int]
    """What lives at the moment when most memory is used, by category, with balanced routing."""
    peak_worst: dict[str, int]
    """The same when every token of the ranks that share experts picks as many of this rank's as it can. Without expert
    parallelism the same as `peak`."""
    largest: dict[str, int]
    """The most of each category at any time of a step, balanced routing; of different moments, so not a sum. With many
    micro-batches in a pipeline whose schedule runs all forwards first, of the few that were run."""
    largest_worst: dict[str, int]
    """The same with the worst routing."""
    activations: dict[str, int]
    """Kept by the forward of one micro-batch, logits included: "kept" and "checkpointed" (activation checkpointing)."""
    in_flight: int
    """Micro-batches times stages whose activations live at once."""
    sent: dict[str, int]
    """Bytes sent in one step, by axis and collective; see `dmoe.parallel.traffic`."""

    @property
    def total(self) -> int:
        """Peak with balanced routing."""
        return sum(self.peak.values())

    @property
    def total_worst(self) -> int:
        """Peak with the worst routing."""
        return sum(self.peak_worst.values())


@dataclass(frozen=True)
class Plan:
    """Every pipeline rank of a run."""

    world_size: int
    parallel: ParallelConfig
    precision: str
    micro_batches: int
    ranks: list[RankPlan]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def plan(config: RunConfig, world_size: int) -> Plan:
    """Plan `config` on `world_size` ranks, in this process. Nothing of the size of the model is allocated.

    `train.precision` "auto" counts as bf16, `train.compile` is left out (the eager step is planned, which needs more).
    On a GPU an expert activation is computed at once and on the CPU in blocks: the CPU's way is planned if
    `train.device` is "cpu".

    Raises:
        ConfigError: layout, model and batch do not fit, with the words of training; or fp64, fp8 experts, adapters
            or a backend other than "torch", whose memory is not counted.
    """
    require(world_size > 0, "--dry-run", world_size, "the number of ranks, 1 or more")
    layout = resolve(config.parallel, world_size)
    check_model(layout, config.model, config.train)
    check_trainable(config.model, config.train)
    _check_plannable(config)
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    train = replace(config.train, precision=precision, compile=False)
    config = replace(config, train=train, parallel=layout)
    # A process for each: torch keeps process groups of an earlier rank in caches that nothing empties.
    with multiprocessing.get_context("spawn").Pool(min(layout.pp, os.cpu_count() or 1), maxtasksperchild=1) as pool:
        jobs = [(config, world_size, stage) for stage in range(layout.pp)]
        ranks = pool.starmap(_plan_rank, jobs, chunksize=1)
    return Plan(world_size, layout, precision, train.batch_size // train.micro_batch_size, ranks)


def _check_plannable(config: RunConfig) -> None:
    require(config.train.precision != "fp64", "train.precision", "fp64", '"bf16" or "fp32" for a plan')
    backend = config.model.moe.backend
    require(backend in (None, "torch"), "model.moe.backend", backend, 'left out, or "torch", for a plan')
    precision = config.model.moe.precision
    require(precision == "same", "model.moe.precision", precision, '"same" for a plan')
    require(config.train.lora.rank == 0, "train.lora.rank", config.train.lora.rank, "0 for a plan")


def _plan_rank(config: RunConfig, world_size: int, stage: int) -> RankPlan:
    # Of a module that returns a view, under tensor parallelism; nobody writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    rank = stage * (world_size // config.parallel.pp)
    wanted = config.train.batch_size // config.train.micro_batch_size
    few, more = _micro_batches_to_run(wanted, config.parallel)
    with _fake_ranks(config.parallel, world_size, rank) as mesh:
        first = _measure(config, mesh, few) if few != more else None
        second = _measure(config, mesh, more, activations=True)
        worst = _measure(config, mesh, more, worst=True) if config.parallel.ep > 1 else second
    steps = (few, more, wanted)

    def peak_of(measured: _Measurement) -> dict[str, int]:
        if first is None or config.parallel.schedule not in _ALL_FORWARDS_FIRST or config.parallel.pp == 1:
            return measured.peak  # more micro-batches do not live at once
        kept = {c: first.peak[c] + measured.peak[c] - second.peak[c] for c in (ACTIVATIONS, LOGITS, EXCHANGE)}
        return measured.peak | _continued(kept, {c: measured.peak[c] for c in kept}, steps)

    in_flight = second.in_flight
    if config.parallel.schedule in _ALL_FORWARDS_FIRST and config.parallel.pp > 1:
        in_flight = wanted * config.parallel.num_local_stages
    return RankPlan(
        rank=rank,
        pipeline_rank=stage,
        parameters=second.parameters,
        peak=peak_of(second),
        peak_worst=peak_of(worst),
        largest=second.largest,
        largest_worst=worst.largest,
        activations=second.activations,
        in_flight=in_flight,
        sent=_continued(None if first is None else first.sent, second.sent, steps),
    )


def _micro_batches_to_run(wanted: int, config: ParallelConfig) -> tuple[int, int]:
    """Two numbers of micro-batches from which the rest follows; twice the same where it is few enough to run all."""
    if config.pp == 1:
        return min(wanted, 1), min(wanted, 2)
    few = 2 * config.pp if config.schedule in V_SCHEDULES else config.pp
    return (wanted, wanted) if wanted <= few + config.pp else (few, few + config.pp)


def _continued(first: dict[str, int] | None, second: dict[str, int], steps: tuple[int, int, int]) -> dict[str, int]:
    """The straight line through two measurements, at a third number of micro-batches."""
    if first is None:
        return dict(second)
    few, more, wanted = steps
    return {
        key: second.get(key, 0) + (second.get(key, 0) - first.get(key, 0)) * (wanted - more) // (more - few)
        for key in {**first, **second}
    }


@contextlib.contextmanager
def _fake_ranks(config: ParallelConfig, world_size: int, rank: int) -> Iterator[ParallelMesh]:
    """This process as one of many ranks, whose collectives do nothing."""
    from torch.testing._internal.distributed import fake_pg  # registers the backend

    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=world_size)
    try:
        yield build_mesh(config)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class _Measurement:
    parameters: dict[str, int]
    peak: dict[str, int]
    largest: dict[str, int]
    sent: dict[str, int]
    activations: dict[str, int]
    in_flight: int


def _measure(
    config: RunConfig, mesh: ParallelMesh, micro_batches: int, *, worst: bool = False, activations: bool = False
) -> _Measurement:
    """One training step of `micro_batches`, after one that made the optimiser's state."""
    train = replace(config.train, batch_size=micro_batches * config.train.micro_batch_size)
    device = torch.device("cpu")
    on_cpu = config.train.device == "cpu"
    gather_dtype = torch.bfloat16 if autocast(train, device)._enabled else None
    parts = parallelize(config.model, mesh, train, gather_dtype=gather_dtype)
    counter = TrafficCounter(mesh)
    sequences, tokens = train.micro_batch_size // mesh.dp_size, train.seq_len // config.parallel.cp
    width = logits_width(config.model.vocab_size, mesh)
    timeline = MemoryTimeline(
        logits_width=width, logits_numel=sequences * tokens * width, on_call=counter.count,
        expand=operators(config.train.device, gather_dtype is not None, config.parallel.ep > 1),
        rounding=1 if on_cpu else 512,
    )  # fmt: skip
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with as_on(config.train.device), fake, timeline:
        for part in parts:
            part.to_empty(device=device)
        make_trainable(parts, train, mesh)
        engine = Engine(parts, train, device, mesh)
        for part in parts:
            for layer in moe_layers(part).values():
                if isinstance(layer.dispatcher, AllToAllDispatcher):
                    layer.dispatcher = _KnownCounts(layer.dispatcher, worst)
        optimizer = build_optimizer(parts, config.optim)
        for parameter in engine.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        flights = _count_flights(engine)
        ids = torch.zeros(sequences * micro_batches, tokens, dtype=torch.int64)
        counter.sent.clear()
        with following_step(timeline, engine.parameters, optimizer):
            training_step(engine, optimizer, Batch(ids, ids.clone()), config.optim)
        account, sent = account_of(timeline), dict(counter.sent)
        kept = _activations(engine, timeline, ids[:sequences]) if activations else {}
    peak = account.categories | ({} if on_cpu else {WORKSPACES: CUDA_WORKSPACES})
    in_flight = flights[1] if engine.pipeline else 1
    return _Measurement(_parameters(engine), peak, account.largest, sent, kept, in_flight)


def logits_width(vocab_size: int, mesh: ParallelMesh | None) -> int:
    """Columns of the logits on this rank."""
    tp = 1 if mesh is None or not mesh.config.loss_parallel else mesh.config.tp
    if mesh is None or tp == 1:
        return vocab_size
    part = -(-vocab_size // tp)
    return max(0, min(part, vocab_size - part * mesh.dense.get_local_rank("tp")))


def _parameters(engine: Engine) -> dict[str, int]:
    counts = {"dense": 0, "experts": 0, "embeddings": 0}
    for part in engine.parts:
        for name, parameter in part.named_parameters():
            kind = "experts" if ".experts." in name else "dense"
            kind = "embeddings" if name.startswith(("embed_tokens.", "lm_head.")) else kind
            counts[kind] += local(parameter).numel()
    return counts


def _activations(engine: Engine, timeline: MemoryTimeline, ids: Tensor) -> dict[str, int]:
    """What the forward of one micro-batch through all parts of this rank keeps, without and with checkpointing."""
    kept = {"kept": 0, "checkpointed": 0}
    for part in engine.parts:
        for key, checkpointing in (("kept", False), ("checkpointed", True)):
            part.activation_checkpointing = checkpointing
            start = timeline.clock
            with autocast(engine.train, engine.device):
                x = _input_of(part, engine, ids)
                # The logits are not kept: the loss saves what it needs of them.
                loss = engine.loss(part(x), ids) if part.is_last else part(x)
            sizes = timeline.at_present(since=start)
            kept[key] += sum(sizes[c] for c in (ACTIVATIONS, CAST, LOGITS, EXCHANGE))
            loss.sum().backward()  # leaves everything as it was
        part.activation_checkpointing = engine.train.activation_checkpointing
    return kept


def _input_of(part: Any, engine: Engine, ids: Tensor) -> Tensor:
    if part.is_first:
        return ids
    assert engine.pipeline is not None
    outline = next(o for p, o in engine.pipeline.part_of_stage.values() if p is part)
    return torch.zeros(outline.shape, dtype=outline.dtype, requires_grad=True)


def _count_flights(engine: Engine) -> list[int]:
    """[now, most at once]: forwards whose backward is not finished."""
    flights = [0, 0]
    stages = engine.pipeline.stages if engine.pipeline is not None else []

    def after(stage: Any, method: str, change: Any) -> None:
        original = getattr(stage, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            flights[0] += change(kwargs)
            flights[1] = max(flights)
            return result

        setattr(stage, method, counted)

    for stage in stages:
        after(stage, "forward_one_chunk", lambda kwargs: 1)
        after(stage, "backward_one_chunk", lambda kwargs: -1 if kwargs.get("full_backward", True) else 0)
        after(stage, "backward_weight_one_chunk", lambda kwargs: -1)
    return flights


class _KnownCounts:
    """An all-to-all dispatcher whose counts, which a fake tensor does not have, are given: all alike, or, in the worst
    case, every token of every rank of the group picks as many of this rank's experts as it can."""

    def __init__(self, dispatcher: AllToAllDispatcher, worst: bool) -> None:
        self._dispatcher, self._worst = dispatcher, worst

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Any, shared: Any) -> Tensor:
        group = self._dispatcher.group
        num_tokens, top_k = routing.topk_ids_TK.shape
        blocks = self._blocks(num_tokens, top_k, group.size(), group.rank())

        def tolist(counts: Tensor) -> list[Any]:
            if isinstance(self._dispatcher, TokenDispatcher) and top_k > 1:
                return self._tokens_and_picks(num_tokens, top_k, blocks)
            if counts.shape[0] == 2 != group.size() or not self._dispatcher.max_rows:
                return [blocks[group.rank()], [row[group.rank()] for row in blocks]]
            return blocks

        original = FakeTensor.tolist
        FakeTensor.tolist = tolist  # type: ignore
        try:
            return self._dispatcher(x_TD, routing, experts, shared)
        finally:
            FakeTensor.tolist = original  # type: ignore[method-assign]

    def _blocks(self, num_tokens: int, top_k: int, size: int, rank: int) -> list[list[int]]:
        """Rows from each rank (first index) to each."""
        rows = num_tokens * top_k
        if not self._worst:
            return [_split(rows, size, shift=sender) for sender in range(size)]
        here = num_tokens * min(top_k, self._dispatcher.num_experts // size)
        elsewhere = _split(rows - here, size - 1)
        return [[*elsewhere[:rank], here, *elsewhere[rank:]] for _ in range(size)]

    def _tokens_and_picks(self, num_tokens: int, top_k: int, blocks: list[list[int]]) -> list[list[list[int]]]:
        """Tokens for each rank, their picks, which nobody asks for, tokens from each rank, and their picks here."""
        size, rank, num_experts = len(blocks), self._dispatcher.group.rank(), self._dispatcher.num_experts
        num_local = num_experts // size
        picks = [row[rank] for row in blocks]
        if self._worst:
            others = min(num_tokens, blocks[rank][rank - 1])  # of the picks that are left, as many tokens as can be
            send = [num_tokens if r == rank else others for r in range(size)]
            return [[send, []], [[num_tokens if n else 0 for n in picks], picks]]
        # A token whose picks are any top_k of the experts has one on a rank with this probability.
        share = 1 - math.comb(num_experts - num_local, top_k) / math.comb(num_experts, top_k)
        tokens = [round(num_tokens * share)] * size
        return [[tokens, []], [tokens, picks]]


def _split(rows: int, parts: int, shift: int = 0) -> list[int]:
    """As even as can be; who gets one more starts at `shift`."""
    base, extra = divmod(rows, parts)
    return [base + ((i - shift) % parts < extra) for i in range(parts)]
