"""Where fine-tuning starts: configuration, tokeniser and weights in the folder of a run or a Hugging Face model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dmoe.checkpoint import find_checkpoints
from dmoe.checkpoint.manifest import MANIFEST
from dmoe.config import ModelConfig, require

_PROBE_BYTES = 2**20


def base_config(path: Path) -> ModelConfig:
    """The model in a folder. Raises ConfigError if it has none, or is the folder of a run with adapters."""
    from dmoe.checkpoint import formats

    _check_folder(path)
    return formats.read_config(path)


def base_tokenizer(path: Path) -> Path | None:
    """The tokenizer.json of a folder, if it has one."""
    from dmoe.checkpoint import formats

    return formats.tokenizer_file(path)


def load_base(parts: Sequence[nn.Module], path: Path) -> None:
    """Fill the parameters of a model's parts, which may be sharded, from a folder. Collective."""
    from dmoe.checkpoint import formats

    _check_folder(path)
    formats.load_into(parts, path)


def fingerprint(path: Path) -> str:
    """A hash that changes when the weights in a folder are others, read from little of them.

    Of a run: what the manifest of its newest checkpoint, or of the one that `path` is, says, which has a checksum for
    every file. Of safetensors: names, sizes, and the first and last MiB of each file.
    """
    digest = hashlib.sha256()
    files = sorted(path.glob("*.safetensors"))
    if not files:
        checkpoints = [path] if (path / MANIFEST).exists() else find_checkpoints(path)
        require(bool(checkpoints), "train.init_from", str(path), "a folder with a checkpoint or safetensors files")
        digest.update((checkpoints[0] / MANIFEST).read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_PROBE_BYTES))
            stream.seek(max(0, size - _PROBE_BYTES))
            digest.update(stream.read(_PROBE_BYTES))
    return digest.hexdigest()


def has_adapters(path: Path) -> bool:
    """Whether a folder is of a run that trains adapters, or a checkpoint of one, which holds nothing else."""
    import yaml

    run_dir = path.parent.parent if (path / MANIFEST).exists() else path
    try:
        content = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return bool(content["train"]["lora"]["rank"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):  # whoever reads the rest says what is wrong
        return False


def _check_folder(path: Path) -> None:
    require(path.is_dir(), "train.init_from", str(path), "a folder: of a run, or of a Hugging Face model")
    if has_adapters(path):
        wanted = f"no run with adapters: dmoe lora merge {path} DST makes a run of it that has whole weights"
        require(False, "train.init_from", str(path), wanted)
