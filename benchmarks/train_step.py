"""A whole training step of an OLMoE-shaped language model, against the same model in transformers.

    python benchmarks/train_step.py [--backends triton,torch] [--compile both] [--micro-batch N] [--json FILE] ...

A step is forward, backward, gradient norm, clipping and fused AdamW, on fresh random tokens. `dmoe`: the trainer's own
model, engine, loss (cross entropy, balancing loss, z-loss), load statistics and step. `transformers`:
`OlmoeForCausalLM` with experts "grouped_mm", attention "sdpa" and its loss (without a z-loss), in a bare loop that does
not wait for the device; the same AdamW. Both have the same weights and tokens, and first losses are compared.

Precision, the same for both: "bf16" has weights, gradients and AdamW's moments in bf16; "autocast" has them in fp32
under bf16 autocast, as `dmoe train` does. The experts of transformers do not follow autocast: they then compute in
fp32, so that only the default compares like with like.

Compiled: "layers" compiles each decoder layer, as `dmoe train` does, "model" the whole model, as transformers
documents; "on" is the usual one of each, "both" that and eager. There are as many layers, 16 at most, as `bytes_needed`
estimates to fit into --memory-gib. Every variant runs in a process of its own; the median of steps without a pause
between them is shown. MFU: 6 FLOPs a token for each active parameter (but the embedding look-up), plus 12 * layers *
heads * head_dim * sequence / 2 for causal attention, over the card's dense bf16 peak. "x": tokens/s over those of the
fastest variant of transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from moe_layer import describe  # which also sets how the allocator works, here and in the processes started from here
from torch import Tensor, nn

from dmoe.bench.measure import attempt
from dmoe.cli.arguments import Parser
from dmoe.config import ModelConfig, OptimConfig, TrainConfig, require
from dmoe.errors import ConfigError
from dmoe.models import Decoder, count_parameters, get_preset
from dmoe.ops.expert_mlp import BACKENDS
from dmoe.parallel.layout import compile_layers
from dmoe.train.device import _PEAK_BF16, memory_gib, resolve_device
from dmoe.train.engine import Batch, Engine
from dmoe.train.optim import build_optimizer
from dmoe.train.step import training_step

PEER = "transformers"
_OPTIM = OptimConfig(lr=1e-4)
_SIZES = {"hidden_size": 2048, "expert_width": 1024, "experts": 64, "top_k": 8, "heads": 16, "vocab_size": 50304}
_RUN = {"seq_len": 4096, "micro_batch": 2, "steps": 10, "warmup": 3}
_SMOKE = dict(zip([*_SIZES, *_RUN, "layers", "device"], [64, 32, 8, 2, 2, 128, 16, 2, 1, 1, 2, "cpu"]))


def model_config(options: argparse.Namespace, layers: int) -> ModelConfig:
    """OLMoE-1B-7B with what the options change; the balancing loss keeps weight 0.01 on the mean over the layers."""
    width, heads, aux = options.hidden_size, options.heads, 0.01 / layers
    require(width % heads == 0, "--hidden-size", width, f"divisible by --heads ({heads})")
    config = get_preset("olmoe-1b-7b")
    experts = {"intermediate_size": options.expert_width, "num_experts": options.experts, "top_k": options.top_k}
    return replace(
        config, num_layers=layers, hidden_size=width, num_heads=heads, num_kv_heads=heads, head_dim=width // heads,
        vocab_size=options.vocab_size, max_seq_len=options.seq_len,
        moe=replace(config.moe, aux_loss_coef=aux, **experts),
    )  # fmt: skip


def bytes_needed(config: ModelConfig, options: argparse.Namespace) -> float:
    """Weights, gradients, two moments, and an estimate of what an eager step of the peer, the larger one, keeps.

    A routed row: its gathered x and its output [D] and four of width F, in bf16. A token of a layer: 40 D bytes, for
    attention and four norms, which keep fp32 copies. The logits: in bf16 and fp32, softmax, two gradients. Autocast
    makes bf16 copies of the weights.
    """
    D, F, K = config.hidden_size, config.moe.intermediate_size, config.moe.top_k
    kept = 2 * K * (2 * D + 4 * F) + 40 * D
    # One layer more: the gradients of what a layer keeps live along with it.
    a_token = kept * (config.num_layers + 1) + 16 * config.vocab_size
    states = count_parameters(config, 1)["num_params"] * {"bf16": 8, "autocast": 18}[options.precision]
    return states + options.micro_batch * options.seq_len * a_token


def layers_that_fit(options: argparse.Namespace, device: torch.device, most: int = 16) -> int:
    """The largest number of layers whose step needs at most --memory-gib: 0.85 of the card, or of this machine's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    memory = options.memory_gib * 2**30 if options.memory_gib else 0.85 * total
    for layers in range(most, 0, -1):
        if (needed := bytes_needed(model_config(options, layers), options)) <= memory:
            return layers
    raise ConfigError(f"--memory-gib is {memory / 2**30:.1f}: must be at least {needed / 2**30:.1f} for one layer")


def peak_flops(options: argparse.Namespace, device: torch.device) -> float | None:
    """Dense bf16 FLOP/s: those given, or the data sheet's of a known card. Its PCIe and NVL forms are slower."""
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split() if device.type == "cuda" else [])
    known = [peak for key, peak in _PEAK_BF16.items() if key in words and not words & {"PCIe", "NVL"}]
    return 1e12 * (options.peak_tflops or sum(known[:1])) or None


def build_decoder(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Ours; its initial weights depend on nothing but their names."""
    model = Decoder.on_meta(config).to(dtype).to_empty(device=device)
    model.init_weights(0)
    return model


def build_peer(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' OLMoE with the weights of `build_decoder`. The names differ by a prefix and the router's."""
    from transformers import AutoModelForCausalLM, OlmoeConfig

    moe = config.moe
    # Its balancing loss is K at equal load, where ours is 1, and is taken once over all layers.
    wanted: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": moe.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_seq_len, "num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}, "rms_norm_eps": config.norm_eps,
        "pad_token_id": None, "eos_token_id": None, "use_cache": False, "output_router_logits": moe.aux_loss_coef > 0,
        "router_aux_loss_coef": moe.aux_loss_coef * config.num_layers / moe.top_k,
        "attn_implementation": "sdpa", "experts_implementation": "grouped_mm",
    }  # fmt: skip
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(OlmoeConfig(**wanted), dtype=dtype)
    ours = build_decoder(config, device, dtype).state_dict().items()
    renamed = {f"model.{name.replace('.mlp.router.', '.mlp.gate.')}": weight for name, weight in ours}
    renamed["lm_head.weight"] = renamed.pop("model.lm_head.weight")
    model.load_state_dict(renamed)
    return model.train()


def peer_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(what is minimised, the cross entropy in it)."""
    output = model(input_ids=batch.inputs, labels=batch.targets, shift_labels=batch.targets)
    extra = 0.0 if output.aux_loss is None else model.config.router_aux_loss_coef * output.aux_loss.detach()
    return output.loss, output.loss.detach() - extra


def our_step(config: ModelConfig, options: argparse.Namespace, device: torch.device) -> Callable[[Batch], Any]:
    """The trainer's step. Its engine is told "fp32" where the weights are bf16: that is, no autocast."""
    autocast, size = options.precision == "autocast", options.micro_batch
    config = replace(config, moe=replace(config.moe, backend=options.variant.removeprefix("dmoe-")))
    model = build_decoder(config, device, torch.float32 if autocast else torch.bfloat16)
    if options.scope == "layers":
        compile_layers(model)
    elif options.scope == "model":
        model.compile()
    steps = {"batch_size": size, "micro_batch_size": size, "seq_len": options.seq_len}
    train = TrainConfig(**steps, precision="bf16" if autocast else "fp32")
    engine, optimizer = Engine([model], train, device), build_optimizer(model, _OPTIM)
    return lambda batch: training_step(engine, optimizer, batch, _OPTIM).loss


def peer_step(config: ModelConfig, options: argparse.Namespace, device: torch.device) -> Callable[[Batch], Any]:
    """A plain loop around transformers' model and loss."""
    autocast = options.precision == "autocast"
    model = build_peer(config, device, torch.float32 if autocast else torch.bfloat16)
    if options.scope != "off":  # an eager call first: it installs the hooks that hand out the router's logits
        with torch.no_grad():
            peer_loss(model, random_batches(1, options, device)[0])
        for part in model.get_submodule("model.layers").children() if options.scope == "layers" else [model]:
            part.compile()
    optimizer = build_optimizer(model, _OPTIM)

    def step(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss, cross_entropy = peer_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return cross_entropy

    return step


def random_batches(count: int, options: argparse.Namespace, device: torch.device) -> list[Batch]:
    """The same in every process."""
    shape = (count, options.micro_batch, options.seq_len + 1)
    ids = torch.randint(options.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    return [Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous()) for window in ids]


def timed(step: Callable[[Batch], Any], batches: list[Batch], device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds and losses of steps that follow each other without a pause."""
    gpu = device.type == "cuda"
    marks, losses = list[Any](), list[Any]()
    for batch in [*batches, None]:
        marks.append(torch.cuda.current_stream().record_event(torch.cuda.Event(True)) if gpu else time.perf_counter())
        if batch is not None:
            losses.append(step(batch))
    if gpu:
        torch.cuda.synchronize(device)
    seconds = [start.elapsed_time(end) / 1e3 if gpu else end - start for start, end in pairwise(marks)]
    return seconds, [float(loss) for loss in losses]


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What one variant's process finds out."""
    config = model_config(options, options.layers)
    # A layer that dynamo gives up on would run eagerly unseen.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device.index is not None:
        torch.cuda.set_device(device)
    step = (peer_step if options.variant == PEER else our_step)(config, options, device)
    batches = random_batches(options.warmup + options.steps, options, device)
    warmup_seconds, losses = timed(step, batches[: options.warmup], device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, more = timed(step, batches[options.warmup :], device)
    if not all(map(math.isfinite, losses := losses + more)):
        raise RuntimeError(f"losses are not all finite: {losses}")
    return {
        "step_seconds": statistics.median(seconds), "rounds": seconds, "first_step_s": warmup_seconds[0],
        "peak_gib": memory_gib(device), "losses": losses,
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }  # fmt: skip


def run_apart(arguments: list[str], layers: int, name: str, scope: str, limit: float) -> dict[str, Any]:
    """`measure` in a fresh process; {"problem": one line} if it fails, crashes or takes too long."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--layers", str(layers)]
    command += ["--variant", name, "--scope", scope]
    # A session of its own, so that the compiler's worker processes end with it.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, errors = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"problem": f"no result in {limit:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode == 0:
        return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
    last = [line for line in errors.splitlines() if line.strip()][-1:]
    return {"problem": f"ended with code {child.returncode}: {''.join(last)[:160]}"}


def add_rates(report: dict[str, Any]) -> None:
    """tokens/s, MFU, and the ratio to the fastest variant of the peer, where they are known."""
    results = [r for r in report["results"] if "problem" not in r]
    for r in results:
        r["tokens_per_second"] = report["tokens"] / r["step_seconds"]
        r["mfu"] = report["peak_flops"] and r["tokens_per_second"] * report["flops_per_token"] / report["peak_flops"]
    best = max((r["tokens_per_second"] for r in results if r["name"] == PEER), default=None)
    for r in results:
        r["ratio"] = best and r["tokens_per_second"] / best


def table(report: dict[str, Any]) -> str:
    """A line a variant."""
    lines = [f"\n{'':15}{'compiled':>9}{'ms':>10}{'tokens/s':>11}{'MFU':>7}{'peak GiB':>10}{'first s':>9}{'x':>7}"]
    for r in report["results"]:
        line = f"{r['name']:15}{r['compiled']:>9}"
        if "problem" not in r:
            mfu, ratio = (f"{r['mfu']:.1%}" if r["mfu"] else "-"), (f"{r['ratio']:.2f}" if r["ratio"] else "-")
            line += f"{1e3 * r['step_seconds']:>10.1f}{r['tokens_per_second']:>11,.0f}{mfu:>7}{r['peak_gib']:>10.1f}"
            line += f"{r['first_step_s']:>9.1f}{ratio:>7}"
            line += f"  {r['graph_breaks']} graph breaks" if r["graph_breaks"] else ""
        lines.append(f"{line}  {r.get('problem', '')}".rstrip())
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="train_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backends", help="of dmoe, with commas between (triton,torch; on the CPU torch)")
    add("--skip-peer", action="store_true", help="leave transformers out")
    add("--compile", choices=["off", "on", "both", "layers", "model"], default="both", help="see above (both)")
    add("--precision", choices=["bf16", "autocast"], default="bf16", help="see above (bf16)")
    add("--memory-gib", type=float, help="what a step may need (0.85 of the card)")
    add("--layers", type=int, help="instead of as many as fit")
    for name, default in {**_SIZES, **_RUN}.items():
        add(f"--{name.replace('_', '-')}", type=int, default=default, help=f"({default})")
    add("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    add("--peak-tflops", type=float, help="of the card, for MFU; known for some by their names")
    add("--limit", type=float, default=300.0, help="seconds a variant (300)")
    add("--smoke", action="store_true", help="one step of a tiny model on the CPU, where nothing else is asked for")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--variant", help=argparse.SUPPRESS)  # these two of the process of one variant
    add("--scope", help=argparse.SUPPRESS)
    parser.set_defaults(**(_SMOKE if "--smoke" in arguments else {}))
    options = parser.parse_args(arguments)
    for name in (*_SIZES, *_RUN, "layers", "memory_gib", "peak_tflops", "limit"):
        value = getattr(options, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')}", value, "greater than 0")
    return options


def variants(options: argparse.Namespace, device: torch.device) -> list[tuple[str, str]]:
    """(name, what is compiled) in the order of the table."""
    backends = (options.backends or ("triton,torch" if device.type == "cuda" else "torch")).split(",")
    for name in backends:
        require(name in BACKENDS, "--backends", options.backends, f"some of {','.join(BACKENDS)}")
    names = [f"dmoe-{backend}" for backend in backends] + ([] if options.skip_peer else [PEER])
    scopes = {"on": ["usual"], "both": ["off", "usual"]}.get(options.compile, [options.compile])
    return [(n, s.replace("usual", "model" if n == PEER else "layers")) for n in names for s in scopes]


def main(arguments: list[str]) -> int:
    """Print the table, write JSON if asked. 1 if a variant of ours failed, or first losses differ."""
    options = parse(arguments)
    device = resolve_device(options.device, "--device")
    if options.variant:
        result, problem = attempt(lambda: measure(options, device))
        print("\n" + json.dumps({"problem": problem} if problem else result))
        return 0
    layers = options.layers or layers_that_fit(options, device)
    config = model_config(options, layers)
    report = {
        "machine": describe(device), "settings": {k: str(v) if k == "json" else v for k, v in vars(options).items()},
        "model": asdict(config), **count_parameters(config, options.seq_len), "peak_flops": peak_flops(options, device),
        "tokens": options.micro_batch * options.seq_len, "results": [],
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"{layers} layers; {report['num_active_params']:,} of {report['num_params']:,} parameters active", flush=True)
    for name, scope in variants(options, device):
        found = run_apart(arguments, layers, name, scope, options.limit)
        report["results"].append({"name": name, "compiled": scope, **found})
        print(f"{name}, compiled {scope}: {found.get('problem', 'done')}", flush=True)
        add_rates(report)
        if options.json:
            temporary = options.json.with_name(f".{options.json.name}.tmp")
            temporary.write_text(json.dumps(report, indent=1))
            temporary.replace(options.json)  # the whole file or the one before
    print(table(report))
    losses = [r["losses"][0] for r in report["results"] if "problem" not in r]
    differ = bool(losses) and max(losses) - min(losses) > 0.01 * max(losses)
    if differ:
        print(f"WRONG: first losses from the same weights and tokens: {min(losses):.4f} to {max(losses):.4f}")
    return 1 if differ or any("problem" in r for r in report["results"] if r["name"] != PEER) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(str(error))
