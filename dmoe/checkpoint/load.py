"""Read checkpoints: a named one, the newest whole one, or only the model's weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dmoe.checkpoint import manifest, ranks, tree
from dmoe.checkpoint.parts import Parts, as_parts, model_tensors
from dmoe.checkpoint.stored_form import stored_form
from dmoe.errors import ConfigError, RunError

# Its tensors may be absent: there is one set of random states a rank and a device, and a run may resume on others.
OPTIONAL_SECTION = "rng."
_ADVICE = "use the configuration it was written with"


def load_checkpoint(path: Path, state: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Verify the checkpoint folder `path` and load it into `state`; returns (step, the "trainer" section).

    `state` has the form that was saved: its tensors are filled in place, keeping device and layout (DTensors of any
    sharding read their part), its other values are replaced. A section that it lacks is not read; "trainer" need not
    be there. Random states that the checkpoint lacks are removed from `state["rng"]`. Collective over all ranks.

    Raises RunError for a damaged checkpoint, and ConfigError where `state` and checkpoint do not match in names,
    shapes or dtypes. After an error the content of `state` is undefined.
    """
    path = Path(path)
    return _load(path, state, cast=False)


def load_latest(
    run_dir: Path, state: dict[str, Any], *, on_refused: Callable[[str], None]
) -> tuple[int, dict[str, Any]] | None:
    """Load the newest whole checkpoint of a run into `state`; see `load_checkpoint`.

    A damaged one is reported by `on_refused` (one line, on rank 0) and the next older one is tried. Returns None if
    the run has no checkpoint; raises RunError if it has some and all are damaged. The file `latest` is not consulted.
    """
    return _load_newest(Path(run_dir), state, on_refused, cast=False)


def load_model_weights(
    run_dir_or_checkpoint: Path, model: Parts, *, on_refused: Callable[[str], None] | None = None
) -> int:
    """Verify a checkpoint and load its model section into `model`, a module or this rank's parts; returns the step.

    The path is a checkpoint folder, or a run's folder, whose newest whole checkpoint is taken; damaged ones are
    reported by `on_refused` (default: a warning). Weights are converted to the dtype of `model`, which must not be on
    the meta device. Raises ConfigError if there is no checkpoint or it is of another model, RunError if it is damaged.
    """
    path = Path(run_dir_or_checkpoint)
    tensors = model_tensors(as_parts(model))
    if any(tensor.is_meta for holders in tensors.values() for tensor in holders):
        raise ValueError("the model is on the meta device: materialise it before loading weights")
    state: dict[str, Any] = {"model": {name: holders[0] for name, holders in tensors.items()}}
    if (path / manifest.MANIFEST).is_file() or (manifest.folder_step(path) is not None and path.is_dir()):
        loaded: tuple[int, dict[str, Any]] | None = _load(path, state, cast=True)
    else:
        loaded = _load_newest(path, state, on_refused or warnings.warn, cast=True)
    if loaded is None:
        raise ConfigError(f"checkpoint is {str(path)!r}: must be a checkpoint folder or a run folder that has one")
    for first, *others in tensors.values():
        for other in others:
            other.copy_(first)
    return loaded[0]


def _load_newest(
    run_dir: Path, state: dict[str, Any], on_refused: Callable[[str], None], *, cast: bool
) -> tuple[int, dict[str, Any]] | None:
    # Also folders without a manifest: a checkpoint is published with one, so one that lacks it has lost it.
    folders = ranks.on_main(lambda: manifest.published_folders(run_dir))
    for path in folders:
        try:
            return _load(path, state, cast=cast)
        except RunError as error:
            if ranks.rank() == 0:
                on_refused(f"checkpoint {path.name} is refused: {error}")
    if folders:
        raise RunError(f"all {len(folders)} checkpoints in {manifest.checkpoints_root(run_dir)} are damaged")
    return None


def _load(path: Path, state: dict[str, Any], *, cast: bool) -> tuple[int, dict[str, Any]]:
    from dmoe.checkpoint.dcp_io import read_tensors

    ranks.on_each(lambda: manifest.verify_share(path, ranks.rank(), ranks.size()))
    sections = {key: value for key, value in state.items() if key != "trainer"}
    metadata, values, tensors = _prepare(path, sections, cast)
    read_tensors(path, metadata, tensors)
    _forget_unread(state.get("rng", {}), tensors)
    tree.fill(sections, {key: value for key, value in values.items() if key in sections})
    state.update(sections)
    trainer = values.get("trainer", {})
    if "trainer" in state:
        state["trainer"] = trainer
    return manifest.read_manifest(path)["step"], trainer


def _prepare(path: Path, sections: dict[str, Any], cast: bool) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """Read the small files and say which tensors to read: (DCP metadata, values, name -> tensor).

    Names, shapes and dtypes are compared; a problem on one rank is raised on all of them.
    """
    from dmoe.checkpoint.dcp_io import read_dcp_metadata

    problem: Exception | None = None
    metadata: Any = None
    values: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    try:
        tensors = tree.flatten(tree.map_tensors(tree.split(sections)[0], stored_form))
        metadata = read_dcp_metadata(path)
        values = manifest.read_values(path)
        saved = metadata.state_dict_metadata
        tensors = {
            n: t for n, t in tensors.items() if not n.startswith(OPTIONAL_SECTION) or _same_size(t, saved.get(n))
        }
        _compare(path, tensors, saved, cast)
    except (ConfigError, RunError) as error:
        problem = error
    answers = ranks.gather((problem, list(tensors)))
    for first in (p for p, _ in answers if p is not None):
        raise first
    # Under pipeline parallelism a rank has some of the layers, so what nobody asked for is known only together.
    wanted = {name for _, names in answers for name in names}
    for name in metadata.state_dict_metadata:
        if name not in wanted and name.split(".")[0] in sections and not name.startswith(OPTIONAL_SECTION):
            raise ConfigError(f"{name} is in checkpoint {path} and not in this run: {_ADVICE}")
    return metadata, values, tensors


def _same_size(tensor: torch.Tensor, saved: Any) -> bool:
    return getattr(saved, "size", None) == tensor.size()


def _compare(path: Path, wanted: dict[str, torch.Tensor], saved: dict[str, Any], cast: bool) -> None:
    for name, tensor in wanted.items():
        if name not in saved:
            raise ConfigError(f"{name} is not in checkpoint {path}: {_ADVICE}")
        if not hasattr(saved[name], "properties"):
            raise RunError(f"{path}: {name} is not a tensor")
        if saved[name].size != tensor.size():
            shapes = list(tensor.size()), list(saved[name].size)
            raise ConfigError(f"{name} has shape {shapes[0]}: must be {shapes[1]} as in checkpoint {path}; {_ADVICE}")
        if saved[name].properties.dtype != tensor.dtype and not cast:
            dtypes = tensor.dtype, saved[name].properties.dtype
            raise ConfigError(f"{name} is {dtypes[0]}: must be {dtypes[1]} as in checkpoint {path}; {_ADVICE}")


def _forget_unread(rng: dict[str, Any], read: dict[str, torch.Tensor]) -> None:
    """Remove random states that the checkpoint lacks, so that they are not mistaken for restored ones."""
    for owner, generators in rng.items():
        for name in list(generators):
            if f"{OPTIONAL_SECTION}{owner}.{name}" not in read:
                del generators[name]
