"""From a directory to a directory: `upcycle`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dmoe.checkpoint.formats import families, open_source
from dmoe.checkpoint.formats.conversion import write_dmoe
from dmoe.checkpoint.formats.dmoe_run import HF_FILES
from dmoe.checkpoint.formats.extra_files import CONFIG, original_config, read_json, write_json
from dmoe.checkpoint.formats.hf import write_hf
from dmoe.checkpoint.formats.publish import check_destination, published
from dmoe.checkpoint.formats.safetensors_write import DEFAULT_SHARD_SIZE
from dmoe.checkpoint.upcycle.deviation import Preservation, preservation
from dmoe.checkpoint.upcycle.plan import UpcyclePlan
from dmoe.checkpoint.upcycle.source import UpcycledSource
from dmoe.config import ModelConfig, require
from dmoe.errors import ConfigError

# What of a dense model's config.json is about its tokeniser, and so still true.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Upcycled:
    """What was written."""

    config: ModelConfig
    family: str | None
    """Hugging Face family of the new model; None: none can express it (`to` "dmoe")."""
    preservation: Preservation


def upcycle(
    src: Path | str,
    dst: Path | str,
    plan: UpcyclePlan,
    to: Literal["hf", "dmoe"] = "hf",
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Upcycled:
    """Write the model that `plan` makes of the dense one in `src` to the directory `dst`, one expert at a time.

    Memory: the feed-forward network of one layer, and what `dmoe.checkpoint.formats.convert` needs.

    Args:
        src: any directory that `dmoe.checkpoint.formats.open_source` opens.
        to: "hf": a directory that transformers loads; "dmoe": a run at step 0, for `dmoe train` and `dmoe generate`.
        dtype: of the new tensors. None: that of the dense ones.
        family, shard_size, overwrite: as in `dmoe.checkpoint.formats.convert`.

    Raises:
        ConfigError: the model is not dense, the plan does not fit it, or no family can express the result.
        RunError: damaged files, or the disk refuses; nothing is left.
    """
    src, dst = Path(src), Path(dst)
    require(to in ("hf", "dmoe"), "--to", to, "one of hf, dmoe")
    require(to == "hf" or family is None, "--family", family, "left out with --to dmoe; it is of --to hf")
    check_destination(dst, overwrite)
    if dst.resolve() in (src.resolve(), *src.resolve().parents):
        raise ConfigError(f"destination is {str(dst)!r}: must be apart from the source {str(src)!r}")
    dense = open_source(src)
    source = UpcycledSource(dense, plan)
    found = _family(source.config, family, needed=to == "hf")
    rounds = dtype is not None and any(torch.promote_types(dense.dtype(n), dtype) != dtype for n in dense.names())
    statement = preservation(plan, dense.config, dtype if rounds else None)
    with published(dst, overwrite=overwrite) as folder:
        if to == "hf":
            write_hf(source, folder, origin=src, family=found, dtype=dtype, shard_size=shard_size)
            _keep_token_ids(src, folder / CONFIG)
        else:
            write_dmoe(source, src, folder, final=dst, dtype=dtype)
            _describe_kept_files(source.config, src, folder / HF_FILES / CONFIG, found)
    return Upcycled(source.config, found, statement)


def _family(config: ModelConfig, name: str | None, *, needed: bool) -> str | None:
    if name is not None:
        return name  # checked where it is used
    try:
        return families.name(families.family_for(config))
    except ConfigError as error:
        if needed:
            raise ConfigError(f"{error}; --to dmoe needs no family") from None
        return None


def _keep_token_ids(src: Path, file: Path) -> None:
    """Put the ids of special tokens of the dense model's config.json, if there is one, into the new one."""
    old, new = original_config(src) or {}, read_json(file)
    write_json(file, new | {key: old[key] for key in _TOKEN_IDS if key in old})


def _describe_kept_files(config: ModelConfig, src: Path, file: Path, family: str | None) -> None:
    """Replace the dense model's config.json among a run's kept files, which an export would take for the model's."""
    if not file.is_file():
        return
    if family is None:
        file.unlink()
        return
    (module,) = (f for f in families.FAMILIES if families.name(f) == family)
    new: dict[str, Any] = module.from_config(config)
    write_json(file, new)
    _keep_token_ids(src, file)
