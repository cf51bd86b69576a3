"""Which tile each kernel takes for a layer: read from tables of measured ones, `tables/*.json`.

A table belongs to a family of GPUs and has entries for layers (D, F) with a number of rows an expert. The nearest entry
is taken, so that nothing is tuned while a model trains. `dmoe bench tune` measures entries for another layer; a file
named by the environment variable DMOE_TILES adds its entries to the packaged ones and wins a tie.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from dmoe.errors import ConfigError
from dmoe.ops.kernels.launch import Tile
from dmoe.ops.platform import is_hopper


@dataclass(frozen=True)
class Tiles:
    """A tile for each kernel of a layer. Those over rows have the same `block_m`."""

    up: Tile
    down: Tile
    down_backward: Tile
    up_backward: Tile
    gate_up_gradient: Tile
    down_gradient: Tile

    @property
    def block_m(self) -> int:
        return self.up.block_m


KINDS = tuple(field.name for field in fields(Tiles))

# Good at every shape measured on an H100.
_HOPPER = Tiles(
    up=Tile(block_n=128, stages=4),
    down=Tile(stages=4, split=4),
    down_backward=Tile(split=4),
    up_backward=Tile(stages=4, split=4),
    gate_up_gradient=Tile(stages=4),
    down_gradient=Tile(group_m=4),
)
# Safe on GPUs with 99 KiB of shared memory a program and without a copy engine.
_OTHER = Tile(block_n=128, block_k=32, split=2, flatten=False)
_ANY = Tiles(replace(_OTHER, block_n=64), _OTHER, replace(_OTHER, split=4), _OTHER, _OTHER, _OTHER)
# Results of fp32 operands fill the registers: without tf32 no tensor core takes them from memory.
_WIDE = Tile(block_m=64, block_n=64, block_k=32, warps=4, stages=2, flatten=False)
_FP32 = Tiles(replace(_WIDE, block_n=32), _WIDE, replace(_WIDE, split=4), _WIDE, _WIDE, _WIDE)


@dataclass(frozen=True)
class Entry:
    """Tiles measured for one layer."""

    hidden_size: int
    expert_width: int
    rows_per_expert: int
    tiles: Tiles

    def distance(self, hidden_size: int, expert_width: int, rows_per_expert: int) -> float:
        """Octaves between two layers."""
        pairs = (
            (self.hidden_size, hidden_size), (self.expert_width, expert_width), (self.rows_per_expert, rows_per_expert)
        )  # fmt: skip
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)


def read_table(path: Path) -> list[Entry]:
    """Entries of a table.

    Raises:
        ConfigError: the file is not such a table; names it and what is wrong.
    """
    try:
        entries = [
            Entry(
                raw["hidden_size"], raw["expert_width"], raw["rows_per_expert"],
                Tiles(**{kind: Tile(**raw["tiles"][kind]) for kind in KINDS}),
            )
            for raw in json.loads(path.read_text())["entries"]
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no table of tiles ({type(error).__name__}: {error})") from error
    for number, entry in enumerate(entries):
        for kind in KINDS:
            _check(f"{path}: entries[{number}].tiles.{kind}", kind, getattr(entry.tiles, kind), entry.tiles.block_m)
    return entries


def _check(where: str, kind: str, tile: Tile, block_m: int) -> None:
    """What a kernel would not notice, or only in the compiler's words."""
    for name in ("block_m", "block_n", "block_k", "group_m", "split", "warps", "stages"):
        value = getattr(tile, name)
        power = name not in ("group_m", "stages")
        if type(value) is not int or value < 1 or (power and value & (value - 1)):
            wanted = "a power of two" if power else "an integer above 0"
            raise ConfigError(f"{where}.{name} is {value!r}: must be {wanted}")
    if not kind.endswith("gradient") and tile.block_m != block_m:
        raise ConfigError(f"{where}.block_m is {tile.block_m}: must be {block_m}, as for the other kernels over rows")
    splits = (1, 2) if kind.endswith("gradient") else (1, 2, 4)
    if tile.split not in splits:
        raise ConfigError(f"{where}.split is {tile.split}: must be one of {splits}")


@functools.lru_cache
def _entries(family: str, own: str | None) -> tuple[Entry, ...]:
    packaged = Path(__file__).with_name("tables") / f"{family}.json"
    paths = ([Path(own)] if own else []) + ([packaged] if packaged.exists() else [])
    return tuple(entry for path in paths for entry in read_table(path))


@functools.lru_cache
def _choose(device: torch.device, element_size: int, layer: tuple[int, int, int], own: str | None) -> Tiles:
    hopper = is_hopper(device)
    entries = _entries("hopper" if hopper else "other", own)
    tiles = min(entries, key=lambda e: e.distance(*layer)).tiles if entries else (_HOPPER if hopper else _ANY)
    return adapt(tiles, element_size, rows_per_expert=layer[2])


def adapt(tiles: Tiles, element_size: int, rows_per_expert: int) -> Tiles:
    """The tiles for elements of another size, and for few rows an expert."""
    if element_size == 4:
        return _FP32
    if rows_per_expert > 64 or tiles.block_m != 128:
        return tiles
    over_rows = [kind for kind in KINDS if not kind.endswith("gradient")]
    return replace(tiles, **{kind: replace(getattr(tiles, kind), block_m=64, warps=4) for kind in over_rows})


def choose_tiles(x: Tensor, hidden_size: int, expert_width: int, rows_per_expert: int) -> Tiles:
    """The tiles for a layer of these widths, in the dtype and on the device of `x`.

    Args:
        rows_per_expert: T * K / E. What is chosen changes by octaves of it, so that few kernels are compiled.
    """
    rows = 2 ** round(math.log2(max(rows_per_expert, 1)))
    return _choose(x.device, x.element_size(), (hidden_size, expert_width, rows), os.environ.get("DMOE_TILES"))
