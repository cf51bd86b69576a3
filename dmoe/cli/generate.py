"""`dmoe generate RUN --prompt TEXT`: continue a prompt with a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path

from dmoe.cli.arguments import Parser
from dmoe.cli.options import apply_overrides, read_yaml
from dmoe.config import RunConfig
from dmoe.errors import ConfigError

# Packing a model's experts takes as long as it saves over 20 to 40 tokens (OLMoE-1B-7B's layers).
_WORTH_PACKING = 64


def main(args: list[str]) -> int:
    """Print the prompt and its continuation."""
    parser = Parser(prog="dmoe generate", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of dmoe train")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to add, at most")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=0.9, help="sample among the most likely tokens up to p")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    options = parser.parse_args(args)
    if not (options.run / "config.yaml").exists():
        raise ConfigError(f"run is {str(options.run)!r}: must be a run directory (one with config.yaml)")
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {options.max_new_tokens}: must be greater than 0")
    from dmoe.generate import generate_tokens, load_run
    from dmoe.moe.packed import pack_experts
    from dmoe.train.device import resolve_device

    config = apply_overrides(RunConfig(), read_yaml(options.run / "config.yaml"))
    model, tokenizer = load_run(options.run, config, resolve_device(options.device, "--device"))
    if options.max_new_tokens >= _WORTH_PACKING:
        pack_experts(model)  # on a CPU
    prompt = tokenizer.encode(options.prompt)
    tokens = generate_tokens(
        model, prompt, options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, seed=options.seed, eos_id=tokenizer.eos_id,
    )  # fmt: skip
    print(tokenizer.decode([*prompt, *tokens]))
    return 0
