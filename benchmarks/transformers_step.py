"""A training step of transformers models with their own experts and with ours, all else alike.

    python benchmarks/transformers_step.py [--models olmoe-1b-7b,...] [--experts grouped_mm,dmoe] [--json FILE] ...

A step is forward, backward and fused AdamW on fresh random tokens, in bf16 throughout, with attention "sdpa" and
without a balancing loss. One model is built for a shape, with as many of its layers as `train_step.bytes_needed`
estimates to fit, and only `set_experts_implementation` changes between measurements: weights, optimiser and allocator
are the same. Rounds go through the implementations in turn, each beginning with another one, so that a clock that falls
meets all of them; the first step of each turn is not counted. Shown: the median step, tokens/s, the peak of allocated
memory, and "x", the median over rounds of how much faster than the first of --experts it was. Before the rounds each
implementation computes the same batch with the same weights: losses that differ by more than 1 % are an error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moe_layer import describe
from torch import Tensor
from train_step import bytes_needed, peer_loss, random_batches, timed

from dmoe.bench.measure import attempt
from dmoe.cli.arguments import Parser
from dmoe.config import ModelConfig, OptimConfig, require
from dmoe.errors import ConfigError
from dmoe.integrations.transformers import calls, check, register
from dmoe.models import count_parameters, get_preset
from dmoe.train.device import memory_gib, resolve_device
from dmoe.train.optim import build_optimizer

# Preset -> transformers' model type, and what that calls E and F.
MODELS = {
    "mixtral-8x7b": ("mixtral", "num_local_experts", "intermediate_size"),
    "olmoe-1b-7b": ("olmoe", "num_experts", "intermediate_size"),
    "qwen3-30b-a3b": ("qwen3_moe", "num_experts", "moe_intermediate_size"),
}
EXPERTS = ("eager", "grouped_mm", "batched_mm", "dmoe")
_OPTIM = OptimConfig(lr=1e-6)  # weights, and with them the routing, stay about the same
_RUN = {"seq_len": 4096, "micro_batch": 2, "rounds": 5, "steps": 3}
_SMOKE = {"seq_len": 16, "micro_batch": 2, "rounds": 1, "steps": 1, "layers": 1, "device": "cpu"}


def shape_of(name: str, options: argparse.Namespace) -> ModelConfig:
    """A published model; for --smoke with every width cut down."""
    config = replace(get_preset(name), max_seq_len=options.seq_len)
    if not options.smoke:
        return config
    moe = replace(config.moe, intermediate_size=32, num_experts=8, top_k=2)
    small: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return replace(config, **small, moe=moe)


def layers_that_fit(config: ModelConfig, options: argparse.Namespace, device: torch.device) -> int:
    """The largest number of layers whose step needs at most --memory-gib: 0.85 of the card, or of this machine's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    memory = options.memory_gib * 2**30 if options.memory_gib else 0.85 * total
    one, two = (bytes_needed(replace(config, num_layers=layers), options) for layers in (1, 2))
    wanted = f"at least {one / 2**30:.1f} for one layer"
    require(memory >= one, "--memory-gib", round(memory / 2**30, 1), wanted)
    return min(config.num_layers, 1 + int((memory - one) / (two - one)))


def build(name: str, config: ModelConfig, device: torch.device) -> Any:
    """transformers' model of that shape with its usual random weights, the same in every process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, experts, width = MODELS[name]
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "max_position_embeddings": config.max_seq_len, "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "num_experts_per_tok": config.moe.top_k, experts: config.moe.num_experts, width: config.moe.intermediate_size,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "use_cache": False,
        "tie_word_embeddings": False, "output_router_logits": False, "attn_implementation": "sdpa",
    }  # fmt: skip
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.bfloat16).train()


def select(model: Any, experts: str) -> None:
    """Compute the experts by that implementation from now on."""
    model.set_experts_implementation(experts)
    if experts == "dmoe":
        check(model)


def compare(model: Any, experts: str, batch: Any) -> dict[str, float]:
    """Loss and norm of its gradient, without a step."""
    select(model, experts)
    loss, _ = peer_loss(model, batch)
    loss.backward()
    norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return {"first_loss": float(loss.detach()), "first_grad_norm": float(torch.stack(norms).norm())}


def measure_model(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All rounds of one shape."""
    config = shape_of(name, options)
    config = replace(config, num_layers=options.layers or layers_that_fit(config, options, device))
    model = build(name, config, device)
    optimizer = build_optimizer(model, _OPTIM)
    # The table of one shape is drawn from one seed; the vocabulary is that of the shape.
    settings = argparse.Namespace(**{**vars(options), "vocab_size": config.vocab_size})
    batches = random_batches(options.steps + 1, settings, device)
    results: dict[str, dict[str, Any]] = {e: {"seconds": [], "peak_gib": 0.0} for e in options.experts}

    def step(batch: Any) -> Tensor:
        loss, cross_entropy = peer_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return cross_entropy

    for experts, result in results.items():
        result |= compare(model, experts, batches[0])
    for round in range(options.rounds):
        start = round % len(options.experts)
        for experts in options.experts[start:] + options.experts[:start]:
            measure_turn(results[experts], partial(select, model, experts), step, batches, device)
    if "dmoe" in results:
        require(min(calls(model).values()) > 0, "calls of dmoe's experts", calls(model), "greater than 0")
    tokens, first = options.micro_batch * options.seq_len, options.experts[0]
    for result in results.values():
        result["step_seconds"] = statistics.median(s for turn in result["seconds"] for s in turn)
        result["tokens_per_second"] = tokens / result["step_seconds"]
        pairs = zip(results[first]["seconds"], result["seconds"], strict=True)
        result["ratio"] = statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)
        result["first_loss_difference"] = result["first_loss"] - results[first]["first_loss"]
    return {"layers": config.num_layers, **count_parameters(config, options.seq_len), "results": results}


def measure_turn(
    result: dict[str, Any], begin: Callable[[], None], step: Callable[[Any], Any], batches: list[Any],
    device: torch.device,
) -> None:  # fmt: skip
    """The steps of one implementation in one round."""
    begin()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, losses = timed(step, batches, device)
    result["seconds"].append(seconds[1:])
    result["losses"] = losses
    result["peak_gib"] = max(result["peak_gib"], memory_gib(device))


def table(name: str, found: dict[str, Any]) -> str:
    """A line an implementation."""
    if "problem" in found:
        return f"{name}: {found['problem']}"
    lines = [f"{name}, {found['layers']} layers, {found['num_active_params']:,} of {found['num_params']:,} parameters"]
    lines.append(f"  {'experts':12}{'ms':>10}{'tokens/s':>12}{'peak GiB':>10}{'x':>7}{'first loss':>12}")
    for experts, r in found["results"].items():
        line = f"  {experts:12}{1e3 * r['step_seconds']:>10.1f}{r['tokens_per_second']:>12,.0f}{r['peak_gib']:>10.1f}"
        lines.append(f"{line}{r['ratio']:>7.2f}{r['first_loss']:>12.5f}")
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="transformers_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", default=",".join(MODELS), help=f"with commas between ({','.join(MODELS)})")
    add("--experts", default="grouped_mm,dmoe", help=f"some of {','.join(EXPERTS)} (grouped_mm,dmoe)")
    add("--memory-gib", type=float, help="what a step may need (0.85 of the card)")
    add("--layers", type=int, help="instead of as many as fit")
    for name, default in _RUN.items():
        add(f"--{name.replace('_', '-')}", type=int, default=default, help=f"({default})")
    add("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    add("--smoke", action="store_true", help="tiny models on the CPU, a step each, where nothing else is asked for")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.set_defaults(precision="bf16", **(_SMOKE if "--smoke" in arguments else {}))
    options = parser.parse_args(arguments)
    for name in (*_RUN, "layers", "memory_gib"):
        value = getattr(options, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')}", value, "greater than 0")
    for flag, allowed in (("models", tuple(MODELS)), ("experts", EXPERTS)):
        chosen = getattr(options, flag).split(",")
        wrong = [name for name in chosen if name not in allowed]
        require(not wrong, f"--{flag}", ",".join(wrong), f"some of {','.join(allowed)}")
        setattr(options, flag, list(dict.fromkeys(chosen)))
    return options


def main(arguments: list[str]) -> int:
    """Print the tables, write JSON if asked. 1 if a model failed or losses differ."""
    options = parse(arguments)
    device = resolve_device(options.device, "--device")
    if device.index is not None:
        torch.cuda.set_device(device)
    register()
    settings = {key: str(value) if key == "json" else value for key, value in vars(options).items()}
    report: dict[str, Any] = {"machine": describe(device), "settings": settings, "models": {}}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), flush=True)
    failed = False
    for name in options.models:
        found, problem = attempt(partial(measure_model, name, options, device))
        report["models"][name] = found = {"problem": problem} if problem else found
        print(table(name, found), flush=True)
        failed |= problem is not None
        for experts, result in found.get("results", {}).items():
            if not abs(result["first_loss_difference"]) <= 0.01 * abs(result["first_loss"]):  # NaN too
                print(f"WRONG: first loss with {experts}: {result['first_loss']:.5f}")
                failed = True
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(str(error))
