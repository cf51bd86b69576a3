"""What `moe_layer.py` writes: records for the JSON file, tables for the terminal, bars for the picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dmoe.bench.contest import KINDS, Outcome
from dmoe.bench.error import NAMES
from dmoe.bench.inputs import Shape

_MIB = 2**20
_SHORT = {"forward": "fwd", "forward_backward": "fwd+bwd"}


def layer_record(shape: Shape, routing: str, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """One shape, number of tokens and routing, with every implementation's medians and what follows from them."""
    limits = {kind: outcomes["bmm"].median(kind) if "bmm" in outcomes else None for kind in KINDS}
    results = {}
    for name, outcome in outcomes.items():
        result: dict[str, Any] = {
            "first_call_s": outcome.first_call,
            "saved_bytes": outcome.saved_bytes,
            "peak_bytes": outcome.peak_bytes,
            "problems": outcome.problems,
        }
        for kind in KINDS:
            seconds, limit = outcome.median(kind), limits[kind]
            if seconds is not None:
                result[kind] = {
                    "seconds": seconds,
                    "rounds": outcome.seconds[kind],
                    "tflops": shape.flops(kind) / seconds / 1e12,
                    "percent_of_bmm": None if limit is None else 100 * limit / seconds,
                }
        results[name] = result
    flops = {kind: shape.flops(kind) for kind in KINDS}
    return {"shape": vars(shape), "routing": routing, "flops": flops, "results": results}


def layer_table(record: dict[str, Any]) -> str:
    """Rows are implementations; for each kind milliseconds, TFLOP/s and the percentage of the bmm limit's speed."""
    heads = [f"{_SHORT[kind]} ms{'TFLOP/s':>10}{'% of bmm':>10}" for kind in KINDS]
    lines = [
        _title(record),
        f"{'':20}" + "".join(f"{h:>34}" for h in heads) + f"{'saved MiB':>15}{'peak MiB':>11}{'first s':>9}",
    ]
    for name, result in record["results"].items():
        cells = ""
        for kind in KINDS:
            figures = result.get(kind)
            if figures is None:
                cells += f"{_why(result['problems'].get(kind)):>14}{'':20}"
                continue
            percent = figures["percent_of_bmm"]
            cells += f"{1e3 * figures['seconds']:>14.3f}{figures['tflops']:>10.1f}" + _number(percent, 10, ".1f")
        saved, peak = (None if result[k] is None else result[k] / _MIB for k in ("saved_bytes", "peak_bytes"))
        memory = _why(result["problems"].get("memory")) if "memory" in result["problems"] else ""
        cells += f"{memory:>15}{'':11}" if memory else _number(saved, 15, ".1f") + _number(peak, 11, ".0f")
        lines.append(f"{name:20}{cells}{result['first_call_s']:>9.1f}")
    return "\n".join([*lines, *_reasons(record["results"])])


def decode_record(
    shape: Shape, routing: str, active_bytes: dict[int, float], outcomes: dict[str, Outcome], graph: bool
) -> dict[str, Any]:
    """Decoding of one layer: microseconds by number of tokens, and the rate at which the weights in use were read."""
    results = {}
    for name, outcome in outcomes.items():
        result: dict[str, Any] = {"problems": outcome.problems}
        for tokens, size in active_bytes.items():
            seconds = outcome.median(f"decode {tokens}")
            if seconds is not None:
                result[str(tokens)] = {"seconds": seconds, "gigabytes_per_second": size / seconds / 1e9}
        results[name] = result
    return {
        "shape": vars(shape), "routing": routing, "graph": graph, "results": results,
        "active_bytes": {str(tokens): size for tokens, size in active_bytes.items()},
    }  # fmt: skip


def decode_table(record: dict[str, Any]) -> str:
    """Rows are implementations; for each number of tokens microseconds and GB/s."""
    tokens = list(record["active_bytes"])
    how = "in a CUDA graph" if record["graph"] else "without a graph"
    lines = [
        f"{_title(record, tokens=False)}: decode {how}, microseconds and GB/s of the weights of the experts in use"
    ]
    lines.append(f"{'':20}" + "".join(f"{'T ' + t:>14}{'GB/s':>8}" for t in tokens))
    sizes = record["active_bytes"].values()
    lines.append(f"{'weights in use, MiB':20}" + "".join(f"{size / _MIB:>14.1f}{'':8}" for size in sizes))
    for name, result in record["results"].items():
        cells = ""
        for t in tokens:
            if t in result:
                cells += f"{1e6 * result[t]['seconds']:>14.1f}{result[t]['gigabytes_per_second']:>8.0f}"
            else:
                cells += f"{_why(result['problems'].get(f'decode {t}')):>14}{'':8}"
        lines.append(f"{name:20}{cells}")
    return "\n".join([*lines, *_reasons(record["results"])])


def error_table(record: dict[str, Any]) -> str:
    """Rows are implementations, columns the output and the four gradients."""
    lines = [f"{_title(record)}: relative error against fp64", f"{'':20}" + "".join(f"{n:>15}" for n in NAMES)]
    for name, result in record["results"].items():
        errors = result.get("errors")
        cells = (
            "".join(f"{errors[n]:>15.2e}" for n in NAMES) if errors else f"{_why(result['problems'].get('error')):>15}"
        )
        lines.append(f"{name:20}{cells}" + ("   WRONG RESULT" if errors and is_wrong(errors) else ""))
    return "\n".join([*lines, *_reasons(record["results"])])


def is_wrong(errors: dict[str, float]) -> bool:
    """Beyond rounding, which is some 0.3 to 0.5 % in bf16; NaN too."""
    return not all(error <= 0.05 for error in errors.values())


def _title(record: dict[str, Any], tokens: bool = True) -> str:
    shape = record["shape"]
    title = (
        f"\n{shape['name']}: D {shape['hidden_size']}, F {shape['intermediate_size']}, E {shape['num_experts']}, "
        f"K {shape['top_k']}" + (f", T {shape['tokens']}" if tokens else "")
    )
    return f"{title}, {record['routing']} routing"


def _why(problem: str | None) -> str:
    return "-" if problem is None else problem if problem == "out of memory" else "failed"


def _number(value: float | None, width: int, form: str) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}{form}}"


def _reasons(results: dict[str, Any]) -> Iterable[str]:
    for name, result in results.items():
        by_reason: dict[str, list[str]] = {}
        for kind, problem in result["problems"].items():
            by_reason.setdefault(problem, []).append(kind)
        for problem, kinds in by_reason.items():
            if problem != "out of memory":
                yield f"  {name}, {', '.join(kinds)}: {problem}"


def draw(records: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """Bars of the percentage of the bmm limit: a panel a kind, a group of bars a shape."""
    names = list(dict.fromkeys(name for record in records for name in record["results"] if name != "bmm"))
    figure = Figure(figsize=(max(7.0, 1.2 + 0.17 * (len(names) + 1) * len(records)), 7.0), layout="constrained")
    width = 0.85 / max(1, len(names))
    for row, kind in enumerate(KINDS):
        axes = figure.add_subplot(len(KINDS), 1, row + 1)
        for number, name in enumerate(names):
            found = [(i, record["results"].get(name, {}).get(kind)) for i, record in enumerate(records)]
            bars = [(i + (number - len(names) / 2 + 0.5) * width, f["percent_of_bmm"]) for i, f in found if f]
            bars = [(x, percent) for x, percent in bars if percent is not None]
            axes.bar([x for x, _ in bars], [p for _, p in bars], width, label=name, color=f"C{number}")
        axes.axhline(100, color="black", linewidth=0.8)
        axes.set_ylabel(f"{_SHORT[kind]}, % of balanced bmm")
        labels = [f"{r['shape']['name']}\nT {r['shape']['tokens']}, {r['routing']}" for r in records]
        axes.set_xticks(range(len(records)), labels, fontsize=7)
        axes.grid(axis="y", alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    title = f"One MoE layer, {machine['device']}, torch {machine['torch']}"
    figure.legend(handles, labels, title=title, frameon=False, fontsize=7, ncols=5, loc="outside upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
