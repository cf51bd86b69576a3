"""`dmoe train [PRESET|CONFIG.yaml] [--init-from DIR] [--resume [RUN]] [--section.field value ...]`"""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dmoe.cli.dry_run import dry_run, take_options
from dmoe.cli.init_from import start_from
from dmoe.cli.options import build_config, parse_overrides, print_config_help
from dmoe.config import RunConfig
from dmoe.config.overrides import apply_overrides, merge, read_yaml
from dmoe.errors import ConfigError

if TYPE_CHECKING:
    from dmoe.train import TrainResult

_INIT_FROM = re.compile(r"^--init[-_]from(=.*)?$", re.DOTALL)

_DESCRIPTION = """Train a model:

    dmoe train [PRESET|CONFIG.yaml | --init-from DIR] [--resume [RUN]] [--section.field value ...]

PRESET names a model; a YAML file holds the same fields as the options below, and options override it.
--init-from starts from the weights, the model and the tokenizer of DIR, a run or a Hugging Face folder.
--resume continues the newest run, or RUN, from its newest whole checkpoint. With --run_dir it starts anew if there
is no checkpoint yet, so that one command can be restarted until it is done.
--dry-run WORLD [--json FILE] trains nothing: it prints the memory and the traffic of a rank in a run of WORLD ranks.
SIGINT, SIGTERM and SIGHUP finish the step, save and exit with 128 + signal."""


def main(args: list[str]) -> int:
    """Train; the exit code is 0 when all steps are done."""
    if "-h" in args or "--help" in args:
        print_config_help("dmoe train", _DESCRIPTION)
        return 0
    world_size, json_file, args = take_options(args)
    source = args.pop(0) if args and not args[0].startswith("-") else None
    args = [_INIT_FROM.sub(r"--train.init_from\1", arg) for arg in args]
    if world_size is not None:
        dry_run(_new_config(source, args), world_size, json_file)
        return 0
    resume, args = _take_resume(args)
    config = _new_config(source, args) if resume is None else _resumed_config(source, args, resume)
    from dmoe.train import train

    result = train(config, resume=resume is not None)
    if result.stopped_by is not None:
        return 128 + result.stopped_by
    _finish(result)
    return 0


def _new_config(source: str | None, args: list[str]) -> RunConfig:
    """The configuration of a run that begins: a preset's or a file's, or with --init-from that of a folder's model."""
    file = Path(source) if source is not None and Path(source).suffix in (".yaml", ".yml") else None
    from_file, from_line = read_yaml(file) if file is not None else {}, parse_overrides(args)
    overrides = merge(from_file, from_line)
    train = overrides.get("train")
    folder = train.get("init_from") if isinstance(train, dict) else None
    if not folder:
        return build_config(source, args)
    preset = from_line.get("preset", source if file is None else None)
    if preset is not None:
        raise ConfigError(f"preset is {preset!r} with --init-from {folder}: must be left out, the folder has the model")
    return start_from(str(folder), overrides)


def _finish(result: TrainResult) -> None:
    """On rank 0: print a sample and the comparison with zlib, and write the report."""
    from dmoe.observe.report import write_report
    from dmoe.train.failures import launched_rank, launched_world_size

    if launched_rank() != 0:
        return
    config = apply_overrides(RunConfig(), read_yaml(result.run_dir / "config.yaml"))
    if config.train.sample_tokens and launched_world_size() > 1:
        print(f"a sample: dmoe generate {result.run_dir} --prompt {shlex.quote(config.train.sample_prompt)}")
    elif config.train.sample_tokens:
        print(f"\nA sample, continuing {config.train.sample_prompt!r}:\n{_sample(result.run_dir, config)}\n")
    if result.evaluation is not None:
        ours, zlib = result.evaluation.bits_per_byte, result.zlib_bits_per_byte
        compared = f"{abs(1 - ours / zlib):.1%} {'fewer' if ours < zlib else 'more'}"
        print(f"held-out text: {ours:.4f} bits/byte; zlib -9 needs {zlib:.4f}, the model {compared}")
    print(f"report: {write_report(result.run_dir)}")


def _sample(run_dir: Path, config: RunConfig) -> str:
    from dmoe.generate import generate_tokens, load_run
    from dmoe.train.device import resolve_device

    model, tokenizer = load_run(run_dir, config, resolve_device(config.train.device))
    prompt = tokenizer.encode(config.train.sample_prompt)
    tokens = generate_tokens(
        model, prompt, config.train.sample_tokens, temperature=0.7, top_p=0.9, seed=config.train.seed,
        eos_id=tokenizer.eos_id,
    )  # fmt: skip
    text = tokenizer.decode([*prompt, *tokens])
    temporary = run_dir / ".sample.txt.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(run_dir / "sample.txt")
    return text


def _take_resume(args: list[str]) -> tuple[str | None, list[str]]:
    """The value of --resume ("" without one, None if absent) and the other arguments."""
    rest = list(args)
    for i, arg in enumerate(rest):
        if arg == "--resume":
            has_value = i + 1 < len(rest) and not rest[i + 1].startswith("--")
            value = rest[i + 1] if has_value else ""
            return value, rest[:i] + rest[i + 1 + has_value :]
        if arg.startswith("--resume="):
            return arg.partition("=")[2], rest[:i] + rest[i + 1 :]
    return None, rest


def _resumed_config(source: str | None, args: list[str], resume: str) -> RunConfig:
    overrides = parse_overrides(args)
    if not resume and overrides.get("run_dir"):
        run_dir = Path(overrides["run_dir"])
        if not (run_dir / "config.yaml").exists():
            return _new_config(source, args)
    else:
        run_dir = Path(resume) if resume else _newest_run(Path("runs"))
    if overrides.get("run_dir") and Path(overrides["run_dir"]) != run_dir:
        raise ConfigError(f"--run_dir is {overrides['run_dir']!r} with --resume {resume}: must be left out or the same")
    if source is not None and (resume or not overrides.get("run_dir")):
        raise ConfigError(f"{source!r} with --resume: a resumed run has its own configuration; give options only")
    if not (run_dir / "config.yaml").exists():
        raise ConfigError(f"--resume is {str(run_dir)!r}: must be a run directory (one with config.yaml)")
    saved = merge(read_yaml(run_dir / "config.yaml"), overrides)
    return replace(apply_overrides(RunConfig(), saved), run_dir=str(run_dir))


def _newest_run(root: Path) -> Path:
    runs = sorted(root.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ConfigError(f"--resume: there is no run in {str(root)!r}; name one")
    return runs[-1].parent
