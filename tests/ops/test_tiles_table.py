"""Which tiles the Triton kernels take: tables of measured ones, the nearest entry, a table of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")

from dmoe.errors import ConfigError
from dmoe.ops.kernels import tuned
from dmoe.ops.kernels.launch import Tile
from dmoe.ops.kernels.tuned import KINDS, Entry, Tiles, adapt, choose_tiles, read_table

PACKAGED = sorted(Path(tuned.__file__).with_name("tables").glob("*.json"))
BF16 = torch.empty(1, dtype=torch.bfloat16)


def all_of(tile: Tile) -> Tiles:
    return Tiles(*[tile] * len(KINDS))


def raw_entry(D: int, F: int, rows: int, tile: Tile) -> dict[str, Any]:
    tiles = {kind: asdict(tile) for kind in KINDS}
    return {"hidden_size": D, "expert_width": F, "rows_per_expert": rows, "tiles": tiles}


def write_table(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"entries": entries}))
    return path


@pytest.fixture(autouse=True)
def fresh_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables are read once in a process: no test sees what another one read."""
    caches = (tuned._choose, tuned._entries)
    monkeypatch.delenv("DMOE_TILES", raising=False)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    tile = Tile(64, 128, 32, 4, 1, 4, 2, False)
    path = write_table(tmp_path / "t.json", raw_entry(256, 128, 64, tile), raw_entry(512, 64, 32, Tile()))
    assert read_table(path) == [Entry(256, 128, 64, all_of(tile)), Entry(512, 64, 32, all_of(Tile()))]


def without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


GOOD = raw_entry(256, 128, 64, Tile())
BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "JSONDecodeError"),
    "empty": ("", "JSONDecodeError"),
    "a list": ([GOOD], "TypeError"),
    "no entries": ({}, "entries"),
    "an entry that is a number": ({"entries": [3]}, "TypeError"),
    "no width": ({"entries": [without(GOOD, "expert_width")]}, "expert_width"),
    "no tiles": ({"entries": [without(GOOD, "tiles")]}, "tiles"),
    "a kernel without a tile": ({"entries": [{**GOOD, "tiles": without(GOOD["tiles"], "down_backward")}]}, "down_back"),
    "an unknown setting": ({"entries": [{**GOOD, "tiles": {**GOOD["tiles"], "up": {"block_x": 3}}}]}, "block_x"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_table_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, named = BAD[case]
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match="no table of tiles") as caught:
        read_table(path)
    message = str(caught.value)
    assert str(path) in message
    assert named in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("kind", "setting", "value", "wanted"),
    [
        ("up", "block_k", 48, "a power of two"),
        ("up", "warps", "8", "a power of two"),
        ("down", "stages", 0, "an integer above 0"),
        ("down", "block_m", 64, "128, as for the other kernels over rows"),
        ("down_gradient", "split", 4, r"one of \(1, 2\)"),
    ],
)
def test_a_tile_that_a_kernel_cannot_have_is_refused(
    kind: str, setting: str, value: object, wanted: str, tmp_path: Path
) -> None:
    entry = raw_entry(256, 128, 64, Tile())
    entry["tiles"][kind][setting] = value
    with pytest.raises(ConfigError, match=rf"entries\[0\]\.tiles\.{kind}\.{setting} is {value!r}: must be {wanted}"):
        read_table(write_table(tmp_path / "t.json", entry))


def test_a_missing_file_is_refused_when_tiles_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMOE_TILES", str(tmp_path / "nowhere.json"))
    with pytest.raises(ConfigError, match=r"nowhere\.json: no table of tiles \(FileNotFoundError"):
        choose_tiles(BF16, 256, 128, 64)


def test_distance_is_in_octaves() -> None:
    entry = Entry(1024, 512, 256, all_of(Tile()))
    assert entry.distance(1024, 512, 256) == 0
    assert entry.distance(2048, 512, 256) == entry.distance(512, 512, 256) == 1
    assert entry.distance(512, 1024, 1024) == 4
    assert entry.distance(1024, 512, 0) == entry.distance(1024, 512, 1) == 8


def test_the_nearest_entry_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = [Tile(group_m=n) for n in (1, 2, 3)]
    layers = [(256, 128, 64), (4096, 2048, 64), (4096, 2048, 4096)]
    path = write_table(tmp_path / "t.json", *[raw_entry(*layer, tile) for layer, tile in zip(layers, tiles)])
    monkeypatch.setenv("DMOE_TILES", str(path))
    wanted = {
        (256, 128, 64): 1, (300, 100, 128): 1, (4096, 2048, 128): 2, (3000, 2500, 300): 2, (4096, 2048, 100_000): 3,
        (2048, 4096, 2048): 3, (8, 8, 0): 1,
    }  # fmt: skip
    for layer, group_m in wanted.items():
        assert {getattr(choose_tiles(BF16, *layer), kind).group_m for kind in KINDS} == {group_m}, layer


def test_rows_an_expert_count_by_octaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kernel is not compiled again for every number of tokens."""
    seen = []
    monkeypatch.setattr(tuned, "_choose", lambda device, size, layer, own: seen.append(layer[2]))
    for rows in (0, 1, 2, 3, 60, 64, 70, 90, 91, 128):
        choose_tiles(BF16, 256, 128, rows)
    assert seen == [1, 1, 2, 4, 64, 64, 64, 64, 128, 128]


def test_without_a_table_there_are_tiles_for_any_gpu() -> None:
    """A CPU, in the interpreter, counts as another GPU: no table is packaged for it."""
    assert not any(path.stem == "other" for path in PACKAGED)
    assert choose_tiles(BF16, 256, 128, 4096) == tuned._ANY


def test_ones_own_table_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a layer that is in both tables; another layer still finds the packaged entry."""
    monkeypatch.setattr(tuned, "is_hopper", lambda device: True)
    packaged = read_table(PACKAGED[[path.stem for path in PACKAGED].index("hopper")])
    here, there = packaged[0], packaged[-1]
    mine = Tile(group_m=77)
    layer = (here.hidden_size, here.expert_width, here.rows_per_expert)
    path = write_table(tmp_path / "t.json", raw_entry(*layer, mine))
    assert choose_tiles(BF16, *layer) == here.tiles
    monkeypatch.setenv("DMOE_TILES", str(path))
    assert choose_tiles(BF16, *layer) == all_of(mine)
    assert choose_tiles(BF16, there.hidden_size, there.expert_width, there.rows_per_expert) == there.tiles


def test_an_empty_table_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = choose_tiles(BF16, 256, 128, 64)
    monkeypatch.setenv("DMOE_TILES", str(write_table(tmp_path / "t.json")))
    assert choose_tiles(BF16, 256, 128, 64) == before


def test_adapt_for_fp32() -> None:
    """Elements twice as large would not fit the shared memory of tiles for bf16."""
    tile = Tile(block_k=64, stages=4, split=1)
    assert adapt(all_of(tile), 2, 4096) == all_of(tile)
    assert shared_memory(all_of(tile), 4) > 227 * 1024
    check_tiles(adapt(all_of(tile), 4, 4096), 4, 99 * 1024)


def test_adapt_for_few_rows_an_expert() -> None:
    """Smaller blocks of rows, in all kernels that share them; gradients of weights have no blocks of rows."""
    for rows, block_m in ((65, 128), (64, 64), (0, 64)):
        tiles = adapt(all_of(Tile()), 2, rows)
        for kind in KINDS:
            gradient = kind.endswith("gradient")
            assert getattr(tiles, kind).block_m == (128 if gradient else block_m)
    assert adapt(all_of(Tile(block_m=256)), 2, 1) == all_of(Tile(block_m=256))


def check_tile(tile: Tile) -> None:
    for name in ("block_m", "block_n", "block_k", "split", "warps"):
        value = getattr(tile, name)
        assert isinstance(value, int)
        assert value > 0
        assert value & (value - 1) == 0, f"{name} {value} is no power of two"
    assert min(tile.block_m, tile.block_n, tile.block_k) >= 16
    assert tile.block_n // tile.split >= 16  # 32 bytes of a row
    assert tile.warps in (4, 8)
    assert tile.stages >= 1
    assert tile.group_m >= 1
    assert isinstance(tile.flatten, bool)


def shared_memory(tiles: Tiles, element_size: int) -> int:
    """Bytes of the operands in all stages of the kernel that needs most; those of the up projection are gate and up."""
    parts = {"up": 2}
    every = {kind: getattr(tiles, kind) for kind in KINDS}
    return max(
        (t.block_m + parts.get(kind, 1) * t.block_n) * t.block_k * t.stages * element_size for kind, t in every.items()
    )


def check_tiles(tiles: Tiles, element_size: int, most_shared_memory: int) -> None:
    for field in fields(tiles):
        check_tile(getattr(tiles, field.name))
    rows = [kind for kind in KINDS if not kind.endswith("gradient")]
    assert len({getattr(tiles, kind).block_m for kind in rows}) == 1
    assert shared_memory(tiles, element_size) <= most_shared_memory


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.stem)
def test_packaged_tables(path: Path) -> None:
    """They can be read, fit each other, name no layer twice, and stay sound in every dtype and for few rows."""
    entries = read_table(path)
    assert entries
    layers = [(e.hidden_size, e.expert_width, e.rows_per_expert) for e in entries]
    assert len(set(layers)) == len(layers)
    assert all(isinstance(size, int) and size > 0 for layer in layers for size in layer)
    for entry in entries:
        for element_size in (2, 4):
            for rows in (1, 64, 4096):
                check_tiles(adapt(entry.tiles, element_size, rows), element_size, 227 * 1024)


@pytest.mark.parametrize(("tiles", "kib"), [(tuned._HOPPER, 227), (tuned._ANY, 99)], ids=["Hopper", "other"])
def test_tiles_without_a_table(tiles: Tiles, kib: int) -> None:
    for element_size in (2, 4):
        for rows in (1, 64, 4096):
            check_tiles(adapt(tiles, element_size, rows), element_size, kib * 1024)


def test_tables_are_packaged() -> None:
    """A table that is not in the wheel would silently be replaced by the fallback."""
    assert PACKAGED
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert "ops/kernels/tables/*.json" in project
