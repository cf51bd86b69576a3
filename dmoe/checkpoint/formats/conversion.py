"""`convert`: one format to another, whatever both are."""

from __future__ import annotations

import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmoe.checkpoint.formats import dmoe_run, extra_files, hf
from dmoe.checkpoint.formats.publish import check_destination, published
from dmoe.checkpoint.formats.safetensors_write import DEFAULT_SHARD_SIZE
from dmoe.checkpoint.formats.source import checked_kind, format_module, kind_of, open_source
from dmoe.checkpoint.formats.store import Source
from dmoe.config import ModelConfig
from dmoe.errors import ConfigError


@dataclass(frozen=True)
class Conversion:
    """What was converted."""

    source_kind: str
    config: ModelConfig
    seconds: float
    num_bytes: int
    """Of the files written."""


def convert(
    src: Path | str,
    dst: Path | str,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    fused: bool = False,
    shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    source_kind: str | None = None,
    source_hints: dict[str, Any] | None = None,
    **options: Any,
) -> Conversion:
    """Write the model in `src` to the directory `dst` in the format `to`: "hf", "dmoe", "megatron" or "megablocks".

    Values are copied bit for bit, unless `dtype` asks for another one. `dst` appears when it is whole. Memory: three
    times the largest row of experts or other tensor, and at most 1 GiB that is kept for what follows; see `mapped`.

    Args:
        dtype: of floating-point tensors. The bias of the choice of experts keeps its own, and so does what the format
            has in one dtype only. None: as they are.
        family: "hf" only: the family whose names are used. None: that of the source or the first that fits.
        fused: "hf" only: see `write_hf`.
        shard_size: bytes, most of a file of safetensors.
        overwrite: replace a directory that is not empty.
        source_kind: format of the source; None: found out.
        source_hints: what `open_source` is told beyond it.
        options: of the writers of "megatron" and "megablocks".

    Raises:
        ConfigError: the request cannot be met; nothing was written.
        RunError: damaged source, or the disk refuses; nothing is left.
    """
    started = time.perf_counter()
    src, dst = Path(src), Path(dst)
    checked_kind(to, "--to")
    _check_options(to, family=family, fused=fused, options=options)
    check_destination(dst, overwrite)
    if _overlap(src, dst):
        raise ConfigError(f"destination is {str(dst)!r}: must be apart from the source {str(src)!r}")
    kind = kind_of(src) if source_kind is None else checked_kind(source_kind, "--from")
    source = open_source(src, kind, **(source_hints or {}))
    with published(dst, overwrite=overwrite) as folder:
        if to == "hf":
            hf.write_hf(
                source, folder, origin=src, family=family, dtype=dtype, fused=fused, shard_size=shard_size
            )  # fmt: skip
        elif to == "dmoe":
            write_dmoe(source, src, folder, final=dst, dtype=dtype)
        else:
            if to == "megablocks":
                options["shard_size"] = shard_size
            format_module(to).write(source, folder, dtype=dtype, **options)
        num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Conversion(kind, source.config, time.perf_counter() - started, num_bytes)


def write_dmoe(source: Source, src: Path, folder: Path, *, final: Path, dtype: torch.dtype | None = None) -> None:
    """Write a run directory, with the tokeniser and the other files of `src`, into `folder`, which exists."""
    extra_files.keep_extra_files(src, folder)
    tokenizer = extra_files.tokenizer_file(src)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / extra_files.TOKENIZER)
    _warn_of_tokenizer(tokenizer, src)
    dmoe_run.write_run(source, folder, final=final, dtype=dtype)


def _warn_of_tokenizer(tokenizer: Path | None, src: Path) -> None:
    from dmoe.data.tokenizer import load_tokenizer

    problem = f"{src} has no {extra_files.TOKENIZER}"
    if tokenizer is not None:
        try:
            load_tokenizer(tokenizer)
            return
        except ConfigError as error:
            problem = str(error)
    warnings.warn(f"{problem}; dmoe generate and dmoe train need one", stacklevel=3)


def _check_options(to: str, *, family: str | None, fused: bool, options: dict[str, Any]) -> None:
    if to != "hf":
        for name, value in (("--family", family), ("--fused", fused or None)):
            if value is not None:
                raise ConfigError(f"{name} is {value!r}: must be left out with --to {to}; it is of --to hf")
    if to in ("hf", "dmoe") and options:
        raise ConfigError(f"--{next(iter(options))}: must be left out with --to {to}")


def _overlap(src: Path, dst: Path) -> bool:
    a, b = src.resolve(), dst.resolve()
    return a == b or b in a.parents
