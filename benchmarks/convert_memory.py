"""Memory and time of `dmoe convert` on a checkpoint with Mixtral 8x7B's layers: Hugging Face to a run, and back.

    python benchmarks/convert_memory.py [--gb 8] [--folder /tmp] [--json FILE] [--smoke]

Writes random bf16 weights of about so many GB (3 layers for 8), converts them in processes of their own, and compares
the files that come back with the first ones. Needs three times the space, which is freed again. For each conversion:
the largest resident memory of the process (ru_maxrss), seconds, and GB of weights a second. A file that was just
written is read from the system's cache.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT_GB = 2.0

# In a process of its own, so that its memory is that of one conversion.
_CONVERT = """
import resource, sys
from dmoe.cli import main
code = main(["convert", *sys.argv[1:]])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""
_WRITE = """
import sys
sys.path.insert(0, sys.argv[1])
from convert_memory import write_checkpoint
write_checkpoint(sys.argv[2], float(sys.argv[3]), sys.argv[4] == "smoke")
"""


def write_checkpoint(folder: str, gigabytes: float, smoke: bool) -> None:
    """Random weights in the files of a Mixtral of about this size."""
    import torch

    from dmoe.checkpoint.formats.hf import write_hf
    from dmoe.checkpoint.formats.names import num_params, tensor_shapes
    from dmoe.models.presets import get_preset

    config = get_preset("mixtral-8x7b")
    if smoke:
        moe = replace(config.moe, intermediate_size=64)
        config = replace(config, hidden_size=64, num_heads=2, num_kv_heads=1, vocab_size=512, moe=moe)
        config = replace(config, intermediate_size=64, num_layers=2)
    else:
        one, two = (2 * num_params(replace(config, num_layers=n)) for n in (1, 2))
        config = replace(config, num_layers=max(1, round((gigabytes * 1e9 - 2 * one + two) / (two - one))))

    class Random:
        """Every tensor from a seed of its own, made when it is read."""

        def __init__(self) -> None:
            self.config = config
            self.shapes = tensor_shapes(config)

        def names(self) -> Any:
            return self.shapes

        def dtype(self, name: str) -> torch.dtype:
            return torch.bfloat16

        def read(self, name: str, index: int | None = None) -> torch.Tensor:
            shape = self.shapes[name] if index is None else self.shapes[name][1:]
            generator = torch.Generator().manual_seed(hash((len(name), index or 0)) % 2**31)
            return (
                torch.empty(shape, dtype=torch.int16).random_(-16000, 16000, generator=generator).view(torch.bfloat16)
            )

    Path(folder).mkdir()
    write_hf(Random(), Path(folder))


def convert(src: Path, dst: Path, to: str) -> dict[str, Any]:
    """Figures of one conversion."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CONVERT, str(src), str(dst), "--to", to],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr)
    peak = int(done.stdout.split("PEAK")[1])
    size = sum(file.stat().st_size for file in dst.rglob("*") if file.is_file()) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return {"to": to, "gb": size, "peak_gb": peak * unit / 1e9, "seconds": seconds, "gb_per_second": size / seconds}


def main(args: list[str] | None = None) -> int:
    """Measure; the exit code is 1 if a conversion took more than `LIMIT_GB` of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8.0, help="size of the checkpoint")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is space")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--smoke", action="store_true", help="tiny layers, to see that it runs")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="convert-memory-") as name:
        root = Path(name)
        write = [str(ROOT / "benchmarks"), str(root / "hf"), str(options.gb), "smoke" if options.smoke else ""]
        subprocess.run([sys.executable, "-c", _WRITE, *write], cwd=ROOT, check=True)
        figures = [convert(root / "hf", root / "run", "dmoe"), convert(root / "run", root / "back", "hf")]
        files = [file.name for file in (root / "hf").iterdir()]
        _, differ, absent = filecmp.cmpfiles(root / "hf", root / "back", files, shallow=False)
        if differ or absent:
            raise RuntimeError(f"files differ: {differ + absent}")
    for row in figures:
        print(
            f"-> {row['to']:5} {row['gb']:6.2f} GB  peak memory {row['peak_gb']:5.2f} GB  {row['seconds']:6.1f} s  "
            f"{row['gb_per_second']:5.2f} GB/s"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(any(row["peak_gb"] > LIMIT_GB for row in figures))


if __name__ == "__main__":
    sys.exit(main())
