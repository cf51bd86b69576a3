"""`dmoe train CONFIG [--section.field value ...] --dry-run WORLD [--json FILE]`: what a run would need on each rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dmoe.config import RunConfig
from dmoe.errors import ConfigError

if TYPE_CHECKING:
    from dmoe.train.plan import Plan, RankPlan

_GIB = 2**30


def dry_run(config: RunConfig, world_size: int, json_file: str | None = None) -> None:
    """Print the plan of a run as tables, and write it as JSON (sizes in bytes) if a file is named."""
    from dmoe.train.plan import plan

    result = plan(config, world_size)
    print(render(config, result))
    if json_file:
        try:
            Path(json_file).write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json is {json_file!r}: {error.strerror}") from None


def take_options(args: list[str]) -> tuple[int | None, str | None, list[str]]:
    """The values of --dry-run and --json (None if absent) and the other arguments. Raises ConfigError."""
    world, rest = _take(args, "--dry-run")
    json_file, rest = _take(rest, "--json")
    if world is None:
        if json_file is not None:
            raise ConfigError(f"--json is {json_file!r}: goes with --dry-run WORLD")
        return None, None, args
    if not world.isdigit() or int(world) < 1:
        raise ConfigError(f"--dry-run is {world!r}: must be the number of ranks, 1 or more")
    return int(world), json_file, rest


def _take(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") != flag:
            continue
        if equals:
            return value, args[:i] + args[i + 1 :]
        if i + 1 == len(args) or args[i + 1].startswith("--"):
            raise ConfigError(f"{flag} needs a value")
        return args[i + 1], args[:i] + args[i + 2 :]
    return None, args


def render(config: RunConfig, plan: Plan) -> str:
    """The plan in words: a column for each pipeline rank."""
    p, train = plan.parallel, config.train
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
    layout = ", ".join(f"{axis} {getattr(p, axis)}" for axis in axes if getattr(p, axis) > 1) or "one rank"
    per_rank = train.micro_batch_size // (p.dp_replicate * p.dp_shard)
    rows = [["", *(f"rank {r.rank}" for r in plan.ranks)]]
    if p.pp > 1:
        rows.append(["pipeline rank", *(str(r.pipeline_rank) for r in plan.ranks)])
    size = f"{per_rank} sequences of {train.seq_len // p.cp} tokens"
    lines = [
        f"{config.preset} on {plan.world_size} ranks: {layout}; {plan.precision}",
        f"a step: {plan.micro_batches} micro-batches of {train.micro_batch_size} x {train.seq_len}; on a rank, {size}",
        "",
        _table([*rows, *_parameter_rows(plan.ranks), *_memory_rows(plan, train.activation_checkpointing)]),
        "",
        _table(
            [["sent in a step by one rank, GiB", *(f"rank {r.rank}" for r in plan.ranks)], *_traffic_rows(plan.ranks)]
        ),
    ]
    return "\n".join(lines)


def _parameter_rows(ranks: list[RankPlan]) -> list[list[str]]:
    rows = [["parameters held, millions"]]
    rows += [[f"  {kind}", *(f"{r.parameters[kind] / 1e6:.2f}" for r in ranks)] for kind in ranks[0].parameters]
    return rows


def _memory_rows(plan: Plan, checkpointing: bool) -> list[list[str]]:
    ranks = plan.ranks
    used = [c for c in ranks[0].peak if any(r.peak[c] or r.peak_worst[c] for r in ranks)]
    rows = [["memory at the peak, GiB"]]
    rows += [[f"  {c}", *(_gib(r.peak[c]) for r in ranks)] for c in used]
    rows.append(["  total, balanced routing", *(_gib(r.total) for r in ranks)])
    if plan.parallel.ep > 1:
        rows.append(["  total, all tokens to one rank", *(_gib(r.total_worst) for r in ranks)])
    rows.append(["most at any time, GiB"])
    for c in ("gathered weights", "gradients before reduction", "logits", "exchange buffers"):
        if any(r.largest[c] for r in ranks):
            rows.append([f"  {c}", *(_gib(r.largest[c]) for r in ranks)])
    if plan.parallel.ep > 1:
        rows.append(
            ["  exchange buffers, all to one rank", *(_gib(r.largest_worst["exchange buffers"]) for r in ranks)]
        )
    rows.append(["kept by one forward, GiB"])
    for key, name, on in (("kept", "without checkpointing", False), ("checkpointed", "with checkpointing", True)):
        mark = " (this run)" if checkpointing == on else ""
        rows.append([f"  {name}{mark}", *(_gib(r.activations[key]) for r in ranks)])
    rows.append(["  forwards kept at once", *(str(r.in_flight) for r in ranks)])
    return rows


def _traffic_rows(ranks: list[RankPlan]) -> list[list[str]]:
    names = sorted({name for r in ranks for name in r.sent})
    rows = [[f"  {name}", *(_gib(r.sent.get(name, 0)) for r in ranks)] for name in names]
    return [*rows, ["  total", *(_gib(sum(r.sent.values())) for r in ranks)]]


def _gib(size: int) -> str:
    return f"{size / _GIB:.3f}" if size == 0 or size / _GIB >= 0.0005 else "<0.001"


def _table(rows: list[list[str]]) -> str:
    columns = max(map(len, rows))
    full = [row + [""] * (columns - len(row)) for row in rows]
    widths = [max(len(row[i]) for row in full) for i in range(columns)]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in full
    ]
    return "\n".join(line.rstrip() for line in lines)
