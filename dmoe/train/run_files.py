"""The files of a run directory that say what is run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from dmoe.checkpoint.formats.extra_files import keep_extra_files
from dmoe.config import RunConfig, config_to_yaml
from dmoe.errors import RunError
from dmoe.lora import count_trainable
from dmoe.models import count_parameters


def describe_run(config: RunConfig, data_folder: Path) -> None:
    """Make the run directory and write what is run into it; the tokeniser is copied from `data_folder`.

    Raises:
        RunError: the disk refuses.
    """
    run_dir = Path(config.run_dir)
    counts = count_parameters(config.model, config.train.seq_len)
    counts["num_trained_params"] = count_trainable(config.model, config.train)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write(run_dir / "config.yaml", config_to_yaml(config))
        _write(run_dir / "model.json", json.dumps(counts, indent=1))
        temporary = run_dir / ".tokenizer.json.tmp"
        shutil.copyfile(data_folder / "tokenizer.json", temporary)
        os.replace(temporary, run_dir / "tokenizer.json")
        base = Path(config.train.init_from)
        if config.train.init_from and base.is_dir():  # a run that is continued has them already
            keep_extra_files(base, run_dir)
    except OSError as error:
        raise RunError(f"run_dir {str(run_dir)!r}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
