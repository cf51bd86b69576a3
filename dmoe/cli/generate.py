"""`dmoe generate MODEL --prompt TEXT`: continue a prompt with a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dmoe.cli.arguments import Parser
from dmoe.config import RunConfig
from dmoe.config.overrides import apply_overrides, read_yaml
from dmoe.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from dmoe.data import Tokenizer
    from dmoe.models import Decoder

# Packing a model's experts takes as long as it saves over 20 to 40 tokens (OLMoE-1B-7B's layers).
_WORTH_PACKING = 64


def main(args: list[str]) -> int:
    """Print the prompt and its continuation."""
    parser = Parser(prog="dmoe generate", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of dmoe train, or any that dmoe convert reads")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to add, at most")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=0.9, help="sample among the most likely tokens up to p")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    options = parser.parse_args(args)
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {options.max_new_tokens}: must be greater than 0")
    from dmoe.generate import generate_tokens
    from dmoe.moe.packed import pack_experts
    from dmoe.train.device import resolve_device

    model, tokenizer = _load(options.run, resolve_device(options.device, "--device"))
    if options.max_new_tokens >= _WORTH_PACKING:
        pack_experts(model)  # on a CPU
    prompt = tokenizer.encode(options.prompt)
    tokens = generate_tokens(
        model, prompt, options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, seed=options.seed, eos_id=tokenizer.eos_id,
    )  # fmt: skip
    print(tokenizer.decode([*prompt, *tokens]))
    return 0


def _load(path: Path, device: torch.device) -> tuple[Decoder, Tokenizer]:
    from dmoe.generate import load_run

    if (path / "config.yaml").exists():
        return load_run(path, apply_overrides(RunConfig(), read_yaml(path / "config.yaml")), device)
    from dmoe.checkpoint.formats import from_pretrained, kind_of, tokenizer_file
    from dmoe.data import load_tokenizer

    try:
        kind_of(path)
    except ConfigError as error:
        raise ConfigError(f"run is {str(path)!r}: must be a run directory (one with config.yaml); {error}") from None
    file = tokenizer_file(path)
    if file is None:
        raise ConfigError(f"run is {str(path)!r}: must have a tokenizer.json")
    return from_pretrained(path, device=device), load_tokenizer(file)
