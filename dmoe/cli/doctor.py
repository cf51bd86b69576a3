"""`dmoe doctor [RUN]`: what this machine has and which backends work here; or what went wrong in a run, and where."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path

from dmoe.cli.arguments import Parser
from dmoe.errors import ConfigError

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "tyro", "rich", "tensorboard", "transformers", "triton")


_DESCRIPTION = """Without RUN: versions, devices, threads, and which backends of the expert computation work here.
With a run directory: what went wrong in the run and where, in sentences. Ranks that hang and the collective that they
did not come to (from RUN/hang, which a run writes when nothing moves for profiling.hang_timeout seconds), ranks that
keep the others waiting, steps that were not finite, memory that ran out."""


def main(args: list[str]) -> int:
    """Print the report; the exit code is 1 if something is wrong: with the run, or no backend works on some device."""
    parser = Parser(prog="dmoe doctor", description=_DESCRIPTION)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run directory")
    parser.add_argument("--json", action="store_true", help="the findings about RUN as JSON")
    options = parser.parse_args(args)
    if options.run is not None:
        return _examine_run(Path(options.run), as_json=options.json)
    if options.json:
        raise ConfigError("--json is for a run: dmoe doctor RUN --json")
    return _examine_machine()


def _examine_run(run_dir: Path, *, as_json: bool) -> int:
    from dmoe.observe.hang.run_findings import run_findings

    if not run_dir.is_dir():
        raise ConfigError(f"RUN is {str(run_dir)!r}: must be a run directory")
    if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "hang", "profiling")):
        raise ConfigError(f"RUN is {str(run_dir)!r}: must be a run directory (one with config.yaml)")
    findings = run_findings(run_dir)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    elif not findings:
        print(f"{run_dir}: nothing wrong was found")
    for finding in () if as_json else findings:
        print(f"{finding.kind}: {finding.message}")
    return 1 if findings else 0


def _examine_machine() -> int:
    import torch

    from dmoe import __version__
    from dmoe.train.device import has_fast_bf16

    print(f"dmoe {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages: " + ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    print(f"C++ compiler for torch.compile on the CPU: {shutil.which('c++') or shutil.which('g++') or 'none found'}")
    waits = os.environ.get("OMP_WAIT_POLICY", "not set")
    print(f"threads: {torch.get_num_threads()} of {os.cpu_count()} cores, OMP_WAIT_POLICY {waits}")
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if len(devices) == 1:
        print("GPU: none")
    healthy = True
    for name in devices:
        device = torch.device(name)
        label = "CPU" if name == "cpu" else torch.cuda.get_device_name(device)
        print(f"{name}: {label}; bf16 in hardware: {'yes' if has_fast_bf16(device) else 'no'}")
        states = _backend_states(device)
        healthy = healthy and any(state == "works" for state in states.values())
        for backend, state in states.items():
            print(f"  backend {backend}: {state}")
    if not healthy:
        print("no backend works on some device", file=sys.stderr)
    return 0 if healthy else 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _backend_states(device: object) -> dict[str, str]:
    """Each backend run forward and backward on a small problem and compared with the reference on the CPU in fp64."""
    import torch

    from dmoe.ops import BACKENDS, expert_mlp

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 16, generator=generator, dtype=torch.float64)
    gate_up, down = (torch.randn(4, *size, generator=generator, dtype=torch.float64) for size in ((16, 16), (16, 8)))
    weights, ids = torch.randn(33, 4, generator=generator, dtype=torch.float64).softmax(-1).topk(2)
    expected = expert_mlp(x, ids, weights, gate_up, down, backend="reference")
    states = {}
    for name in BACKENDS:
        try:
            args = [t.to(device, torch.float32).requires_grad_() for t in (x, weights, gate_up, down)]  # type: ignore[call-overload]
            y = expert_mlp(args[0], ids.to(device), *args[1:], backend=name)  # type: ignore[call-overload]
            y.sum().backward()
            error = float((y.detach().cpu().double() - expected).norm() / expected.norm())
            states[name] = "works" if error < 1e-4 else f"WRONG by {error:.1e} relative"
        except Exception as error:  # whatever it is, it is the answer
            states[name] = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return states
