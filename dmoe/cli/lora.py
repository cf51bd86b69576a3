"""`dmoe lora merge RUN DST` and `dmoe lora export RUN DST`: what a run with adapters learned, in other forms."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from dmoe.cli.arguments import Parser
from dmoe.config import RunConfig, config_to_yaml
from dmoe.config.overrides import apply_overrides, read_yaml
from dmoe.errors import ConfigError, RunError

_ACTIONS = {
    "merge": "fold the adapters into the weights: DST becomes a run directory that needs no base",
    "export": "write the adapters alone, as PEFT reads them: adapter_config.json and adapter_model.safetensors",
}


def main(args: list[str]) -> int:
    """Merge or export; prints where to."""
    epilog = "\n".join(f"{name:7} {text}" for name, text in _ACTIONS.items())
    parser = Parser(
        prog="dmoe lora", description=__doc__, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=list(_ACTIONS), help="see below")
    parser.add_argument("run", type=Path, help="run directory of dmoe train with train.lora.rank > 0")
    parser.add_argument("dst", type=Path, help="folder to write; must not exist")
    parser.add_argument("--base", default="", help="export: what PEFT loads the model from; default: train.init_from")
    options = parser.parse_args(args)
    config = _adapted_config(options.run)
    if options.dst.exists():
        raise ConfigError(f"dst is {str(options.dst)!r}: must not exist yet")
    try:
        if options.action == "merge":
            _merge(options.run, options.dst, config)
        else:
            _export(options.run, options.dst, config, options.base)
    except OSError as error:
        raise RunError(f"dst {str(options.dst)!r}: {error.strerror or error}") from error
    print(f"wrote {options.dst}")
    return 0


def _adapted_config(run_dir: Path) -> RunConfig:
    if not (run_dir / "config.yaml").exists():
        raise ConfigError(f"run is {str(run_dir)!r}: must be a run directory (one with config.yaml)")
    config = apply_overrides(RunConfig(), read_yaml(run_dir / "config.yaml"))
    if not config.train.lora.rank:
        raise ConfigError(f"run is {str(run_dir)!r}: must be one with adapters (train.lora.rank > 0)")
    return config


def _merge(run_dir: Path, dst: Path, config: RunConfig) -> None:
    from dmoe.checkpoint import save_checkpoint
    from dmoe.checkpoint.parts import model_tensors
    from dmoe.lora import merge
    from dmoe.lora.load import load_adapted, without_adapters

    model, step = load_adapted(run_dir, config)
    merge(model)
    dst.mkdir(parents=True)
    (dst / "config.yaml").write_text(config_to_yaml(without_adapters(config, dst)), encoding="utf-8")
    counts = json.loads((run_dir / "model.json").read_text(encoding="utf-8"))
    counts["num_trained_params"] = counts["num_params"]
    (dst / "model.json").write_text(json.dumps(counts, indent=1), encoding="utf-8")
    shutil.copyfile(run_dir / "tokenizer.json", dst / "tokenizer.json")
    tensors = {name: holders[0] for name, holders in model_tensors([model]).items()}
    save_checkpoint(dst, step, {"model": tensors})


def _export(run_dir: Path, dst: Path, config: RunConfig, base: str) -> None:
    from dmoe.lora.load import load_adapted
    from dmoe.lora.peft import export_peft

    model, _ = load_adapted(run_dir, config)
    export_peft(model, config.model, config.train.lora, dst, base=base or config.train.init_from)
