"""The files of a Hugging Face directory beside its weights: what a conversion hands on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dmoe.checkpoint.formats.dmoe_run import HF_FILES, run_folder
from dmoe.checkpoint.formats.dmoe_run import is_one as is_run
from dmoe.errors import RunError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
# Files of tokenisers of all kinds, of generation and of chat templates.
_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*.json", "vocab*.txt", "merges.txt", "*.model",
    "*.tiktoken", "generation_config.json", "chat_template*", "LICENSE*", "USE_POLICY*",
)  # fmt: skip


def extra_folder(path: Path) -> Path | None:
    """Where the extra files of a source are: beside the weights, or in a run's `hf/`. None: there are none."""
    if not is_run(path):
        return path if path.is_dir() else path.parent
    folder = run_folder(path) / HF_FILES
    return folder if folder.is_dir() else None


def original_config(path: Path) -> dict[str, Any] | None:
    """The config.json that the model came with, if it is still there. Raises RunError if it cannot be read."""
    folder = extra_folder(path)
    return read_json(folder / CONFIG) if folder is not None and (folder / CONFIG).is_file() else None


def copy_extra_files(path: Path, folder: Path) -> None:
    """Copy the extra files of the source `path`, but for config.json, into `folder`, which exists."""
    origin = extra_folder(path)
    if origin is None:
        return
    for file in sorted(origin.iterdir()):
        if file.is_file() and any(file.match(pattern) for pattern in _PATTERNS):
            shutil.copyfile(file, folder / file.name)
    templates = origin / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def keep_extra_files(path: Path, run: Path) -> None:
    """Copy the extra files of the source `path`, config.json too, into the folder `hf/` of `run`, if it has them not.

    Only if there is a config.json: an export starts from it. The folder appears whole or not at all.
    """
    original, kept = original_config(path), run / HF_FILES
    if original is None or kept.exists():
        return
    temporary = run / f".{HF_FILES}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    copy_extra_files(path, temporary)
    write_json(temporary / CONFIG, original)
    temporary.replace(kept)


def tokenizer_file(path: Path | str) -> Path | None:
    """The tokenizer.json of a model's directory, run or checkpoint; None if it has none."""
    path = Path(path)
    folder = run_folder(path) if is_run(path) else path
    return folder / TOKENIZER if (folder / TOKENIZER).is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises RunError."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path}: is not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: must be a JSON object, not a {type(content).__name__}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON as transformers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
