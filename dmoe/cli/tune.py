"""`dmoe bench tune`: measure the tiles of the Triton kernels for a layer, and extend a table with the fastest."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoe.errors import RunError

if TYPE_CHECKING:
    import torch

    from dmoe.bench.inputs import Shape
    from dmoe.bench.tune import Result
    from dmoe.ops.kernels.launch import Tile


def tune_shapes(shapes: list[Shape], device: torch.device, path: Path | None) -> int:
    """Print the fastest tiles of each kernel; write the table to `path` after every shape, beside its other entries."""
    import torch

    from dmoe.bench.tune import tune

    if device.type != "cuda":
        raise RunError(f"bench tune: needs a CUDA GPU, got {device}")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    for shape in shapes:
        with torch.cuda.device(device):
            results = tune(shape, device)
        print(report(shape, results), flush=True)
        if path is not None:
            extend_table(path, entry(shape, {kind: found[0].tile for kind, found in results.items()}))
            print(f"written: {path}", flush=True)
    return 0


def report(shape: Shape, results: dict[str, list[Result]]) -> str:
    """The three fastest tiles of each kernel."""
    sizes = f"D {shape.hidden_size}, F {shape.intermediate_size}, E {shape.num_experts}, K {shape.top_k}"
    lines = [f"\n{shape.name}: {sizes}, T {shape.tokens}"]
    for kind, found in results.items():
        lines.append(f"{kind}: bmm {1e3 * found[0].limit:.3f} ms")
        lines += [
            f"    {1e3 * r.seconds:8.3f} ms  {r.limit / r.seconds:6.1%} of bmm  error {r.error:.1e}  {_short(r.tile)}"
            for r in found[:3]
        ]
    return "\n".join(lines)


def _short(tile: Tile) -> str:
    return ", ".join(f"{f.name} {getattr(tile, f.name)}" for f in fields(tile))


def entry(shape: Shape, tiles: dict[str, Tile]) -> dict[str, Any]:
    """An entry of the table; see `dmoe.ops.kernels.tuned`."""
    return {
        "hidden_size": shape.hidden_size,
        "expert_width": shape.intermediate_size,
        "rows_per_expert": shape.tokens * shape.top_k // shape.num_experts,
        "tiles": {kind: asdict(tile) for kind, tile in tiles.items()},
    }


def extend_table(path: Path, new: dict[str, Any]) -> None:
    """Add an entry, in place of one for the same layer."""
    from dmoe.ops.kernels.tuned import read_table

    key = ("hidden_size", "expert_width", "rows_per_expert")
    old: list[dict[str, Any]] = []
    if path.exists():
        read_table(path)  # refuses what is no table
        old = json.loads(path.read_text())["entries"]
    entries = [e for e in old if [e[k] for k in key] != [new[k] for k in key]] + [new]
    lines = ",\n".join(f" {json.dumps(e)}" for e in entries)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(f'{{"entries": [\n{lines}\n]}}\n')
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"--json is {str(path)!r}: {error.strerror}") from error
