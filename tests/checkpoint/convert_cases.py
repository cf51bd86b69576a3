"""What the tests of conversions share: models as transformers saves them, and comparisons of what was written."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dmoe.checkpoint.formats import SafetensorsSink, convert
from tests.checkpoint.family_cases import theirs


def save_originals(root: Path, cases: list[str]) -> Path:
    """What save_pretrained writes for each case, in a folder of its name."""
    for case in cases:
        theirs(case).save_pretrained(root / case)
    theirs.cache_clear()
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(x.dtype == b[n].dtype and torch.equal(x, b[n]) for n, x in a.items())


def rewritten(folder: Path, change: Any) -> Path:
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def killed_while_writing(rank: int, source: Path, destination: Path) -> None:
    """A process that converts, and dies when it has written a tensor of the second layer."""
    write = SafetensorsSink.write

    def die(sink: SafetensorsSink, name: str, tensor: torch.Tensor) -> None:
        write(sink, name, tensor)
        if "layers.1" in name:
            os.kill(os.getpid(), signal.SIGKILL)

    SafetensorsSink.write = die  # type: ignore[method-assign]
    convert(source, destination, "hf")
