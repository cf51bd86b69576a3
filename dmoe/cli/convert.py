"""`dmoe convert SRC DST --to {hf,dmoe,megablocks,megatron}`: a model into the files of another tool, exactly."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dmoe.cli.arguments import Parser
from dmoe.errors import ConfigError

FORMATS = ("hf", "dmoe", "megablocks", "megatron")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Option(NamedTuple):
    """An option that only one format has."""

    keyword: str
    """Of the format's `write`, or of its `open`."""
    kind: Callable[[str], Any]
    choices: tuple[str, ...] | None
    meaning: str


_WRITING: dict[str, dict[str, _Option]] = {
    "megatron": {
        "layout": _Option("files", str, ("torch_dist", "legacy"), "one checkpoint for all ranks, or files a rank"),
        "tp": _Option("tp", int, None, "tensor-parallel ranks to write for"),
        "pp": _Option("pp", int, None, "pipeline stages to write for"),
        "ep": _Option("ep", int, None, "expert-parallel ranks to write for"),
        "experts": _Option("experts", str, ("sequential", "grouped", "weight1"), "names of the experts' tensors"),
        "norms": _Option("norms", str, ("te", "local"), "implementation of the layers that will load it"),
        "vocab-divisor": _Option("vocab_divisor", int, None, "make_vocab_size_divisible_by"),
        "iteration": _Option("iteration", int, None, "names the checkpoint; 0: release"),
    },
    "megablocks": {
        "names": _Option("names", str, ("hf", "olmo"), "of the tensors around the layers"),
        "layer": _Option("layer", str, ("dMoE", "MoE"), "class that will load the experts"),
    },
}  # fmt: skip
_READING: dict[str, _Option] = {
    "source-config": _Option("config", str, None, "preset or .yaml with the model of SRC, where it has none"),
    "source-vocab-size": _Option("vocab_size", int, None, "megatron: rows of SRC's embedding that are no padding"),
    "source-iteration": _Option("iteration", int, None, "megatron: which checkpoint of SRC; 0: release"),
}


def main(args: list[str]) -> int:
    """Convert; the exit code is 1 if --verify finds another model."""
    parser = _parser()
    options = parser.parse_args(args)
    if options.text is not None and not options.verify:
        raise ConfigError(f"--text is {str(options.text)!r}: must be left out without --verify")
    import torch

    from dmoe.checkpoint.formats.conversion import convert

    hints = _of_source(options)
    dtype = getattr(torch, _DTYPES[options.dtype]) if options.dtype else None
    with warnings.catch_warnings():
        warnings.showwarning = _show
        done = convert(
            options.src, options.dst, options.to, dtype=dtype, family=options.family, fused=options.fused,
            shard_size=parse_size(options.shard_size), overwrite=options.overwrite, source_kind=options.source_format,
            source_hints=hints, **_of_destination(options),
        )  # fmt: skip
    size, config = done.num_bytes / 1e9, done.config
    print(
        f"{options.src} ({done.source_kind}) -> {options.dst} ({options.to}): {config.num_layers} layers, "
        f"{len(config.moe_layers())} of them mixtures, {size:.3g} GB in {done.seconds:.1f} s"
    )
    if not options.verify:
        return 0
    from dmoe.checkpoint.formats.verify import verify

    result = verify(
        options.src,
        options.dst,
        text=options.text,
        rounded=dtype is not None,
        source_kind=options.source_format,
        source_hints=hints,
    )
    print(result)
    return 0 if result.ok else 1


def _parser() -> Parser:
    parser = Parser(prog="dmoe convert", description=__doc__)
    parser.add_argument(
        "src", type=Path, help="Hugging Face directory, run or checkpoint of dmoe, Megatron, MegaBlocks"
    )
    parser.add_argument("dst", type=Path, help="directory to write; appears when it is whole")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    parser.add_argument("--from", dest="source_format", choices=FORMATS, help="format of SRC (default: found out)")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="round to this (default: values as they are)")
    parser.add_argument("--family", help="hf: whose names to use (default: of SRC, or the first that fits)")
    parser.add_argument("--fused", action="store_true", help="hf: all experts of a layer in one tensor")
    parser.add_argument("--shard-size", default="5GB", help="most bytes of a safetensors file (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    parser.add_argument("--verify", action="store_true", help="compare the logits of SRC and DST on text")
    parser.add_argument("--text", type=Path, help="file with that text (default: Python's standard library)")
    for format_name, entries in _WRITING.items():
        group = parser.add_argument_group(f"--to {format_name}")
        for name, option in entries.items():
            group.add_argument(f"--{name}", type=option.kind, choices=option.choices, help=option.meaning)
    group = parser.add_argument_group("sources that do not say it themselves")
    for name, option in _READING.items():
        group.add_argument(f"--{name}", type=option.kind, help=option.meaning)
    return parser


def _given(options: argparse.Namespace, entries: dict[str, _Option]) -> dict[str, Any]:
    """Values of those options that are on the command line, by name of the option."""
    values = {name: getattr(options, name.replace("-", "_")) for name in entries}
    return {name: value for name, value in values.items() if value is not None}


def _of_destination(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the format's `write`. Raises ConfigError for an option of another format."""
    arguments = {}
    for format_name, entries in _WRITING.items():
        for name, value in _given(options, entries).items():
            if format_name != options.to:
                wanted = f"must be left out with --to {options.to}; it is of --to {format_name}"
                raise ConfigError(f"--{name} is {value!r}: {wanted}")
            arguments[entries[name].keyword] = value
    return arguments


def _of_source(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the format's `open`."""
    arguments = {_READING[name].keyword: value for name, value in _given(options, _READING).items()}
    if "config" in arguments:
        from dmoe.cli.options import build_config

        arguments["config"] = build_config(arguments["config"], []).model
    return arguments


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ConfigError(f"--shard-size is {text!r}: must be a size such as 5GB or 500MB")
    return size


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"dmoe: warning: {message}", file=sys.stderr)
