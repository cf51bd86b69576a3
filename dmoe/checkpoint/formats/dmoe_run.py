"""Run directories of `dmoe train`, as sources and as what is written.

What is written is a run at step 0: config.yaml, tokenizer.json where there is one, a checkpoint that has the model and
no optimiser, and `hf/` with the files of a Hugging Face directory that we do not use, so that an export has them again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dmoe.checkpoint import manifest
from dmoe.checkpoint.formats.mapped import listed
from dmoe.checkpoint.formats.names import EMBEDDING, HEAD, cast_dtype, has_expert_rows, tensor_shapes
from dmoe.checkpoint.formats.safetensors_write import Outline
from dmoe.checkpoint.formats.store import Source
from dmoe.checkpoint.stored_form import stored_form
from dmoe.config import DataConfig, ModelConfig, RunConfig, TrainConfig, config_to_yaml
from dmoe.errors import ConfigError, RunError

HF_FILES = "hf"
"""Folder of a run with files that came from, and go back to, a Hugging Face directory."""

_SECTION = "model."
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model.pt")


def is_one(path: Path) -> bool:
    """Whether `path` is a run or a folder of its checkpoints."""
    if _is_checkpoint(path):
        return True
    # Others call their configuration so too, and keep it beside the weights.
    return (path / "config.yaml").is_file() and not any((path / name).is_file() for name in _WEIGHTS)


def run_folder(path: Path) -> Path:
    """The run that `path`, itself or one of its checkpoints, belongs to. Raises ConfigError where there is none."""
    run = path.resolve().parents[1] if _is_checkpoint(path) else path
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"checkpoint is {str(path)!r}: must be in a run, whose config.yaml describes the model")
    return run


def read_run_config(path: Path) -> RunConfig:
    """The configuration of a run or of the run of a checkpoint."""
    from dmoe.config.overrides import apply_overrides, read_yaml

    return apply_overrides(RunConfig(), read_yaml(run_folder(path) / "config.yaml"))


class RunSource:
    """The model of a run's newest whole checkpoint, or of one checkpoint, whatever layout wrote it.

    The checkpoint is verified when it is opened. A read takes the rows that are asked for out of the boxes that the
    ranks wrote; nothing is kept.

    Raises:
        ConfigError: no checkpoint.
        RunError: damaged files, or tensors that do not fit config.yaml.
    """

    def __init__(self, path: Path) -> None:
        from dmoe.checkpoint.formats.dcp_stream import BoxReader

        config = read_run_config(path)
        if config.train.lora.rank:
            raise ConfigError(
                f"run is {str(path)!r}: must have no adapters; dmoe lora merge folds them into the weights"
            )
        self.config: ModelConfig = config.model
        self.folder = path if _is_checkpoint(path) else _newest(path)
        if self.folder == path:
            manifest.verify_checkpoint(path)
        self._boxes = BoxReader(self.folder)
        self._shapes = tensor_shapes(self.config)
        self._outlines = {
            name.removeprefix(_SECTION): outline
            for name, outline in self._boxes.outlines().items()
            if name.startswith(_SECTION)
        }
        self._check()

    def _check(self) -> None:
        tied = {HEAD} if self.config.tie_embeddings else set()
        if missing := self._shapes.keys() - self._outlines.keys():
            raise RunError(f"{self.folder}: {len(missing)} tensors of the model are missing: {listed(missing)}")
        if unknown := self._outlines.keys() - self._shapes.keys() - tied:
            raise RunError(f"{self.folder}: {len(unknown)} tensors are not of the model: {listed(unknown)}")
        for name, shape in self._shapes.items():
            stored = _stored_shape(name, shape)
            if self._outlines[name].shape != stored:
                shapes = list(self._outlines[name].shape), list(stored)
                raise RunError(f"{self.folder}: {name} is stored as {shapes[0]}: must be {shapes[1]} by config.yaml")

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def dtype(self, name: str) -> torch.dtype:
        return self._outlines[name].dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        shape = self._shapes[name] if index is None else self._shapes[name][1:]
        return self._boxes.read(_SECTION + name, index).reshape(shape)


def write_run(source: Source, folder: Path, *, final: Path | None = None, dtype: torch.dtype | None = None) -> None:
    """Write a run at step 0 into `folder`, which exists; its files are named as if it were at `final`.

    Streams: one row of experts or one other tensor is in memory at a time. A file tokenizer.json that is in `folder`
    becomes the run's. Raises RunError if the disk refuses.
    """
    from dmoe.checkpoint.formats.dcp_stream import write_boxes

    config = source.config
    checkpoint = manifest.checkpoints_root(folder) / manifest.folder_name(0)
    checkpoint.mkdir(parents=True)
    shapes = dict(tensor_shapes(config))
    if config.tie_embeddings:
        shapes[HEAD] = shapes[EMBEDDING]  # a checkpoint has a tied head under both names

    def origin(name: str) -> str:
        name = name.removeprefix(_SECTION)
        return EMBEDDING if name == HEAD and config.tie_embeddings else name

    outlines = {
        _SECTION + name: Outline(
            _stored_shape(name, shape), cast_dtype(name, source.dtype(origin(name)), dtype)
        )
        for name, shape in shapes.items()
    }  # fmt: skip
    write_boxes(checkpoint, outlines, has_expert_rows, lambda name, index: source.read(origin(name), index))
    manifest.write_json(checkpoint / manifest.VALUES, {})
    manifest.write_manifest(checkpoint, 0, {})
    (checkpoint.parent / "latest").write_text(checkpoint.name + "\n", encoding="utf-8")
    tokenizer = folder / "tokenizer.json"
    run = run_config(config, (final or folder) / tokenizer.name if tokenizer.is_file() else None)
    (folder / "config.yaml").write_text(config_to_yaml(replace(run, run_dir=str(final or folder))), encoding="utf-8")


def run_config(config: ModelConfig, tokenizer: Path | None) -> RunConfig:
    """Defaults of a run of this model, with the tokeniser's path."""
    from dmoe.models.presets import PRESETS

    preset = next((name for name, model in PRESETS.items() if model == config), RunConfig.preset)
    data = DataConfig(tokenizer="bytes" if tokenizer is None else str(tokenizer.absolute()))
    train = TrainConfig(seq_len=min(TrainConfig.seq_len, config.max_seq_len))
    return RunConfig(preset=preset, model=config, data=data, train=train)


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(stored_form(name, torch.empty(shape, device="meta")).shape)


def _is_checkpoint(path: Path) -> bool:
    return (path / manifest.MANIFEST).is_file() or (path.is_dir() and manifest.folder_step(path) is not None)


def _newest(run: Path) -> Path:
    folders = manifest.published_folders(run)
    if not folders:
        raise ConfigError(f"run is {str(run)!r}: must have a checkpoint in {manifest.checkpoints_root(run)}")
    for folder in folders:
        try:
            manifest.verify_checkpoint(folder)
            return folder
        except RunError as error:
            warnings.warn(f"checkpoint {folder.name} is refused: {error}", stacklevel=2)
    raise RunError(f"all {len(folders)} checkpoints in {manifest.checkpoints_root(run)} are damaged")
