"""What to say when memory ran out: what lived, by category, the largest blocks and where they were made, and advice."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.moe.sharded import local
from dmoe.observe.files import write_json, write_text
from dmoe.observe.memory.accounting import Storage
from dmoe.observe.memory.categories import (
    ACTIVATIONS,
    CAST,
    EXCHANGE,
    GATHERED,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    OTHER,
    TEMPORARY,
    WEIGHTS,
    WHOLE_GRADIENTS,
)  # fmt: skip

_LARGEST = 20
_LESS_TOKENS = "lower train.micro_batch_size"
ADVICE = {
    WEIGHTS: "raise parallel.dp_shard (FSDP) or parallel.ep, so that a rank holds fewer weights",
    GRADIENTS: "raise parallel.dp_shard (FSDP) or parallel.ep, so that a rank holds fewer weights",
    OPTIMIZER: "raise parallel.dp_shard (FSDP) or parallel.ep, so that a rank holds fewer weights",
    CAST: "raise parallel.dp_shard or parallel.ep, which gather and cast one layer at a time",
    GATHERED: "raise parallel.ep, and leave parallel.reshard_after_forward on",
    WHOLE_GRADIENTS: "raise parallel.ep",
    ACTIVATIONS: f"set train.activation_checkpointing, or {_LESS_TOKENS}",
    TEMPORARY: f"{_LESS_TOKENS} or train.seq_len",
    LOGITS: f"{_LESS_TOKENS}, or raise parallel.tp with parallel.loss_parallel",
    EXCHANGE: f"set parallel.max_rows, or {_LESS_TOKENS}",
}


def known_tensors(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str]]:
    """(tensor, category) of what is known without watching."""
    for parameter in parameters:
        yield local(parameter.detach()), WEIGHTS
        if parameter.grad is not None:
            yield local(parameter.grad), GRADIENTS
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                yield local(value), OPTIMIZER


def reachable(known: Iterable[tuple[Tensor, str]], device: str) -> list[Storage]:
    """Storages that Python can reach: `known`, other tensors, and what autograd saved for their backward."""
    found: dict[int, Storage] = {}

    def add(tensor: Tensor, category: str) -> None:
        if tensor.device.type == device and type(tensor) in (Tensor, torch.nn.Parameter):
            # Planned tensors and what the compiler left behind have no memory and say so with an error.
            with contextlib.suppress(RuntimeError, NotImplementedError):
                storage = tensor.untyped_storage()
                found.setdefault(storage.data_ptr(), Storage(category, storage.nbytes(), 0))

    for tensor, category in known:
        add(tensor, category)
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]  # not isinstance: some objects warn
    for tensor in _saved(t.grad_fn for t in tensors if t.grad_fn is not None):
        add(tensor, ACTIVATIONS)
    for tensor in tensors:
        add(tensor, OTHER if tensor.grad_fn is None else ACTIVATIONS)
    return [s for s in found.values() if s.num_bytes]


def _saved(nodes: Iterable[Any]) -> Iterator[Tensor]:
    seen, pending = set(), list(nodes)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                try:
                    value = getattr(node, name)
                except RuntimeError:  # freed
                    continue
                yield from (t for t in (value if isinstance(value, (tuple, list)) else (value,)) if type(t) is Tensor)


def write_report(folder: Path, rank: int, step: int, error: BaseException, storages: list[Storage]) -> str:
    """Write oom_rank{r}.json and .txt; returns the line to fail with."""
    sizes: Counter[str] = Counter()
    for storage in storages:
        sizes[storage.category] += storage.num_bytes
    largest = sorted(storages, key=lambda s: -s.num_bytes)[:_LARGEST]
    message = _message(step, sizes, folder / f"oom_rank{rank}.txt")
    report = {
        "rank": rank, "step": step, "error": str(error), "message": message, "categories": dict(sizes.most_common()),
        "blocks": [{"bytes": s.num_bytes, "category": s.category, "stack": list(s.stack)} for s in largest],
    }  # fmt: skip
    write_json(folder / f"oom_rank{rank}.json", report)
    write_text(folder / f"oom_rank{rank}.txt", _text(report))
    return message


def _message(step: int, sizes: Counter[str], file: Path) -> str:
    if not sizes:
        return f"step {step}: memory ran out; see {file}"
    with_advice = Counter({c: n for c, n in sizes.items() if c in ADVICE}) or sizes
    category, size = with_advice.most_common(1)[0]
    total = sum(sizes.values())
    advice = ADVICE.get(category, _LESS_TOKENS)
    share = f"{category} take {_mib(size)} of {_mib(total)} MiB"
    return f"step {step}: memory ran out; {share}: {advice} (see {file})"


def _text(report: dict[str, Any]) -> str:
    lines = [report["message"], "", report["error"].strip().splitlines()[0] if report["error"].strip() else "", ""]
    lines += [f"{_mib(size):>12} MiB  {category}" for category, size in report["categories"].items()]
    lines += ["", f"the largest {len(report['blocks'])} blocks, and the lines that made them, innermost first:"]
    for block in report["blocks"]:
        lines.append(f"{_mib(block['bytes']):>12} MiB  {block['category']}")
        lines += [f"{'':18}{line}" for line in block["stack"]]
    return "\n".join(lines) + "\n"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
