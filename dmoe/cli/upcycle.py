"""`dmoe upcycle DENSE DST --num-experts E --top-k K`: a mixture-of-experts model from a dense one."""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoe.cli.arguments import Parser
from dmoe.cli.convert import parse_size
from dmoe.errors import ConfigError, RunError

if TYPE_CHECKING:
    from dmoe.checkpoint.upcycle import Preservation, UpcyclePlan
    from dmoe.checkpoint.upcycle.compare import Comparison

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# Largest mean KL divergence, in nats, at which --verify takes the function as kept: it computes in fp32.
_BOUNDS = {"exact": 1e-6, "rounding": 1e-2}


def main(args: list[str]) -> int:
    """Upcycle; prints what was made and how far it is from the dense model."""
    options = _parser().parse_args(args)
    if options.text is not None and not options.verify:
        raise ConfigError(f"--text is {str(options.text)!r}: must be left out without --verify")
    import torch

    from dmoe.checkpoint.upcycle.write import upcycle

    plan = _plan(options)
    dtype = getattr(torch, _DTYPES[options.dtype]) if options.dtype else None
    with warnings.catch_warnings():
        warnings.showwarning = _show
        made = upcycle(
            options.dense, options.dst, plan, options.to, dtype=dtype, family=options.family,
            shard_size=parse_size(options.shard_size), overwrite=options.overwrite,
        )  # fmt: skip
    config, moe = made.config, made.config.moe
    shared = f" and a shared expert of width {moe.shared_intermediate_size}" if moe.shared_intermediate_size else ""
    print(
        f"wrote {options.dst}: {len(config.moe_layers())} of {config.num_layers} layers with {moe.num_experts} experts "
        f"of width {moe.intermediate_size}, {moe.top_k} a token{shared}"
        + (f" (Hugging Face family {made.family})" if made.family else " (of no Hugging Face family)")
    )
    print(f"function: {made.preservation.text}")
    for warning in made.preservation.warnings:
        print(f"note: {warning}")
    if options.verify:
        comparison = _measure(options.dense, options.dst, options.text)
        print(f"measured {comparison}")
        _check(made.preservation, comparison)
    return 0


def _parser() -> Parser:
    from dmoe.checkpoint.upcycle.plan import UpcyclePlan

    defaults = {field.name: field.default for field in fields(UpcyclePlan) if field.default is not MISSING}
    parser = Parser(
        prog="dmoe upcycle", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )  # fmt: skip
    parser.set_defaults(**defaults)
    add = parser.add_argument
    add("dense", type=Path, help="dense model: a Hugging Face directory, or a run of dmoe train")
    add("dst", type=Path, help="directory to write")
    add("--num-experts", type=int, required=True, help="copies E of each network")
    add("--top-k", type=int, required=True, help="copies k that a token goes through")
    add("--granularity", type=int, help="experts G that each copy is split into: E * G experts, k * G a token")
    add("--method", choices=["copy", "drop", "noise"], help="keep the weights, draw channels anew, or add noise")
    add("--drop-ratio", type=float, help="drop: share of each expert's channels that is drawn anew")
    add("--noise-std", type=float, help="noise: in units of each matrix's standard deviation")
    add("--shuffle", action="store_true", help="put the channels of each copy in an order of its own")
    add(
        "--router-init", choices=["normal", "independent", "zero"],
        help="random rows, shared by the parts of a copy; a random row an expert; or all scores equal",
    )  # fmt: skip
    add("--router-std", type=float, help="standard deviation of the router's weights")
    add("--score-function", choices=["softmax", "sigmoid", "sqrtsoftplus"], help="of the router's logits")
    add(
        "--norm-topk-prob", action=argparse.BooleanOptionalAction, help="divide the chosen experts' scores by their sum"
    )  # fmt: skip
    add("--shared", type=int, dest="shared_size", help="width of a shared expert; the dense width: a whole copy")
    add("--shared-gate", action="store_true", help="gate the shared expert, as Qwen2-MoE does")
    add("--layers", help="layers that become mixtures: all, every-N, after-N, or digits such as 0011")
    add("--aux-loss-coef", type=float, help="weight of the balancing loss in each layer")
    add("--z-loss-coef", type=float, help="weight of the router z-loss")
    add("--seed", type=int, help="of all random numbers")
    add("--to", choices=["hf", "dmoe"], default="hf", help="a directory for transformers, or a run for dmoe train")
    add("--family", help="Hugging Face family of the result; default: the first that fits")
    add("--dtype", choices=list(_DTYPES), help="of the new weights; default: as the dense model's")
    add("--shard-size", default="5GB", help="hf: most bytes of a file, such as 5GB")
    add("--overwrite", action="store_true", help="replace a directory that is not empty")
    add("--verify", action="store_true", help="run both models on text in fp32 and compare")
    add("--text", type=Path, help="text file for --verify; default: source of the Python standard library")
    return parser


def _plan(options: argparse.Namespace) -> UpcyclePlan:
    from dmoe.checkpoint.upcycle import UpcyclePlan

    return UpcyclePlan(**{field.name: getattr(options, field.name) for field in fields(UpcyclePlan)})


def _measure(dense: Path, dst: Path, text: Path | None) -> Comparison:
    """One model in memory at a time."""
    from dmoe.checkpoint.formats import from_pretrained
    from dmoe.checkpoint.formats.verify import sample
    from dmoe.checkpoint.upcycle.compare import compare, text_logits

    model = from_pretrained(dense)
    ids_BS = sample(dense, dst, model.config.vocab_size, model.config.max_seq_len, text)
    reference = text_logits(model, ids_BS)
    del model
    return compare(reference, text_logits(from_pretrained(dst), ids_BS), ids_BS)


def _check(statement: Preservation, comparison: Comparison) -> None:
    bound = _BOUNDS.get(statement.kind)
    if bound is not None and not comparison.kl <= bound:  # NaN fails too
        raise RunError(
            f"the upcycled model differs from the dense one: KL is {comparison.kl:.3g} nats, must be at most {bound:g}"
        )


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"dmoe: warning: {message}", file=sys.stderr)
