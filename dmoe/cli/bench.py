"""`dmoe bench layer`: time the expert computation against a dense MLP of equal FLOPs and other ways to compute it.

`dmoe bench tune`: measure the tiles of the GPU kernels for a layer, and extend a table of them (--json).
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoe.cli.arguments import Parser
from dmoe.errors import ConfigError, RunError

if TYPE_CHECKING:
    import torch

    from dmoe.bench.layer import Shape

_DTYPES = ("fp32", "bf16", "fp16")


def main(args: list[str]) -> int:
    """Print one table a data type, and write JSON if asked."""
    parser = Parser(prog="dmoe bench", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=["layer", "tune"], help="what to time")
    parser.add_argument("--shape", action="append", metavar="D,F,E,K,T", help="a shape of your own; may be repeated")
    parser.add_argument("--dtype", action="append", choices=_DTYPES, help="may be repeated; fp32 and bf16 by default")
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    parser.add_argument("--rounds", type=int, default=7, help="rounds that the medians are over")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(args)
    if options.rounds < 1:
        raise ConfigError(f"--rounds is {options.rounds}: must be greater than 0")
    own_shapes = [_parse_shape(text) for text in options.shape or []]
    import torch

    from dmoe.bench.layer import CPU_SHAPES, GPU_SHAPES, time_shape
    from dmoe.train.device import resolve_device

    device = resolve_device(options.device, "--device")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    shapes = own_shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    if options.what == "tune":
        from dmoe.cli.tune import tune_shapes

        return tune_shapes(list(shapes), device, options.json)
    results = []
    for dtype in options.dtype or ("bf16",) if device.type == "cuda" else options.dtype or ("fp32", "bf16"):
        for shape in shapes:
            times = time_shape(shape, dtypes[dtype], device, rounds=options.rounds)
            results.append({"shape": vars(shape), "dtype": dtype, "seconds": times})
            print(_table(shape, dtype, times), flush=True)
    if options.json:
        _write_json(options.json, {"machine": machine(device), "rounds": options.rounds, "results": results})
        print(f"written: {options.json}")
    return 0


def _parse_shape(text: str) -> Shape:
    from dmoe.bench.layer import Shape

    try:
        d, f, e, k, t = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--shape is {text!r}: must be five integers D,F,E,K,T such as 256,384,8,2,2048") from None
    if min(d, f, e, k, t) < 1 or k > e:
        raise ConfigError(f"--shape is {text!r}: must be greater than 0, and K at most E")
    return Shape(text, d, f, e, k, t)


def _table(shape: Shape, dtype: str, times: dict[str, dict[str, float]]) -> str:
    """Milliseconds, GFLOP/s, and the ratio to the dense MLP, for one shape."""
    title = (
        f"\n{shape.name} ({dtype}): D {shape.hidden_size}, F {shape.intermediate_size}, E {shape.num_experts}, "
        f"K {shape.top_k}, T {shape.tokens}\n"
    )
    lines = [f"{'':16}{'forward ms':>12}{'GFLOP/s':>10}{'x dense':>9}{'fwd+bwd ms':>13}{'GFLOP/s':>10}{'x dense':>9}"]
    for name, seconds in times.items():
        line = f"{name:16}"
        for kind, factor, width in (("forward", 1, 12), ("forward_backward", 3, 13)):
            rate = factor * shape.forward_flops() / seconds[kind] / 1e9
            ratio = seconds[kind] / times["dense"][kind]
            line += f"{1e3 * seconds[kind]:>{width}.2f}{rate:>10,.0f}{ratio:>9.2f}"
        lines.append(line)
    return title + "\n".join(lines)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"--json is {str(path)!r}: {error.strerror}") from error
