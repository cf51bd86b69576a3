"""Our reader and writer of safetensors against the format's own library, and every way a file can be damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmoe.checkpoint.formats import Outline, SafetensorsSink, SafetensorsStore
from dmoe.checkpoint.formats.safetensors_read import DTYPES, read_header
from dmoe.errors import RunError


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype that the library writes, a scalar, an empty one, and names in no order."""
    found = {f"t.{i}.{name}": torch.arange(6).reshape(2, 3).to(dtype) for i, (name, dtype) in enumerate(DTYPES.items())}
    del found["t.5.F8_E8M0"]
    bits = torch.randint(0, 256, (3, 4), dtype=torch.uint8)
    return {
        "z": torch.randn(5, 7, 2),
        "a.naïve": torch.tensor(3.5),
        "empty": torch.empty(4, 0, 3),
        "noise": bits.view(torch.float8_e4m3fn),
        **found,
    }


def write(folder: Path, content: dict[str, torch.Tensor], order: list[str] | None = None, **options: Any) -> None:
    sink = SafetensorsSink(folder, {n: Outline(tuple(t.shape), t.dtype) for n, t in content.items()}, **options)
    for name in order or content:
        sink.write(name, content[name])
    sink.close()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def test_files_are_those_of_the_library_whatever_the_order_of_writing(tmp_path: Path) -> None:
    content = tensors()
    save_file(content, tmp_path / "theirs", metadata={"format": "pt"})
    for i, order in enumerate([list(content), list(reversed(content))]):
        folder = tmp_path / str(i)
        folder.mkdir()
        write(folder, content, order)
        assert (folder / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_rows_are_written_and_read_alone(tmp_path: Path) -> None:
    content = {"w": torch.randn(5, 3, 2).bfloat16(), "v": torch.randn(4)}
    sink = SafetensorsSink(tmp_path, {n: Outline(tuple(t.shape), t.dtype) for n, t in content.items()})
    for row in (3, 0, 4, 1, 2):
        sink.write_row("w", row, content["w"][row])
    sink.write("v", content["v"])
    sink.close()
    store = SafetensorsStore(tmp_path)
    assert all(same(store.read("w", row), content["w"][row]) for row in range(5))
    assert same(store.read("v", 2), content["v"][2])
    with pytest.raises(IndexError):
        store.read("w", 5)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    content = tensors()
    save_file(content, tmp_path / "model.safetensors")
    store = SafetensorsStore(tmp_path)
    assert set(store.names()) == set(content)
    for name, tensor in content.items():
        assert (store.shape(name), store.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert same(store.read(name), tensor), name
        assert store.where(name).endswith("model.safetensors")


@pytest.mark.parametrize("size", [1, 100, 168, 10**9])
def test_shards_are_those_of_the_hub_library(tmp_path: Path, size: int) -> None:
    hub = pytest.importorskip("huggingface_hub")
    content = {f"w{i}": torch.full((n,), float(i)) for i, n in enumerate([10, 30, 12, 30, 1, 40, 2])}
    split = hub.split_torch_state_dict_into_shards(content, max_shard_size=size)
    write(tmp_path, content, shard_size=size)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == set(split.filename_to_tensors)
    for file, names in split.filename_to_tensors.items():
        assert set(load_file(tmp_path / file)) == set(names)
    if split.is_sharded:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == split.tensor_to_filename
        assert index["metadata"] == {**split.metadata, "total_parameters": 125}
    store = SafetensorsStore(tmp_path)
    assert all(same(store.read(name), tensor) for name, tensor in content.items())


def test_a_sink_takes_each_tensor_once_whole_and_as_announced(tmp_path: Path) -> None:
    sink = SafetensorsSink(tmp_path, {"a": Outline((2, 3), torch.float32), "b": Outline((1,), torch.float32)})
    with pytest.raises(ValueError, match=r"a is \[3, 2\].*must be \[2, 3\]"):
        sink.write("a", torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"must be \[2, 3\] torch.float32"):
        sink.write("a", torch.zeros(2, 3).half())
    sink.write_row("a", 1, torch.zeros(3))
    sink.write("b", torch.zeros(1))
    with pytest.raises(ValueError, match="1 tensors were not written once and whole, such as a"):
        sink.close()


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGES: dict[str, tuple[Any, int, str]] = {
    "dtype": ({"w": GOOD | {"dtype": "F31"}}, 8, "w has dtype 'F31'"),
    "entry": ({"w": [1]}, 8, "w: its entry is damaged"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "w: its entry is damaged"),
    "shape": ({"w": GOOD | {"shape": [-2]}}, 8, r"w has shape \[-2\]"),
    "bool shape": ({"w": GOOD | {"shape": [True], "data_offsets": [0, 4]}}, 4, r"w has shape \[True\]"),
    "offsets": ({"w": GOOD | {"data_offsets": [0]}}, 8, r"w has data_offsets \[0\]"),
    "backwards": ({"w": GOOD | {"data_offsets": [8, 0]}}, 8, "w has -8 bytes"),
    "size": ({"w": GOOD | {"shape": [3]}}, 8, "w has 8 bytes: must be 12"),
    "overlap": ({"w": GOOD, "v": GOOD | {"data_offsets": [4, 12]}}, 12, "v overlaps w"),
    "same place": ({"w": GOOD, "v": GOOD}, 8, "overlaps"),
    "hole": ({"w": GOOD, "v": GOOD | {"data_offsets": [12, 20]}}, 20, "4 bytes between w and v"),
    "hole before": ({"w": GOOD | {"data_offsets": [4, 12]}}, 12, "4 bytes between the header and w"),
    "beyond": ({"w": GOOD, "v": GOOD | {"data_offsets": [8, 16]}}, 12, "is truncated: v ends at byte 16"),
    "trailing": ({"w": GOOD}, 9, "1 bytes after w belong to no tensor"),
    "list": ([GOOD], 8, "not a JSON object"),
    "json": (b'{"w": ', 8, "its header is damaged"),
    "twice": (b'{"w":%b,"w":%b}' % ((json.dumps(GOOD).encode(),) * 2), 8, "a name appears twice"),
    "utf-8": (b'{"\xff":1}', 8, "its header is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_headers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    header, size, message = DAMAGES[name]
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(content)) + content + bytes(size))
    with pytest.raises(RunError, match=message) as caught:
        read_header(tmp_path / "f")
    assert str(tmp_path / "f") in str(caught.value)


def test_truncated_files_are_refused_wherever_they_end(tmp_path: Path) -> None:
    save_file({"w": torch.randn(4), "v": torch.randn(3).half()}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for end in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:end])
        with pytest.raises(RunError, match="truncated"):
            read_header(tmp_path / "cut")
    (tmp_path / "huge").write_bytes(struct.pack("<Q", 2**63) + bytes(100))
    with pytest.raises(RunError, match="is no safetensors file"):
        read_header(tmp_path / "huge")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"w": torch.randn(4)}, tmp_path / "model.safetensors")
    store = SafetensorsStore(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(RunError, match="truncated within w"):
        store.read("w")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RunError, match="w cannot be read"):
        store.read("w")


def sharded(folder: Path) -> dict[str, Any]:
    write(folder, {"a": torch.zeros(2), "b": torch.ones(2)}, shard_size=8)
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index = sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"

    def refused(weight_map: Any, message: str) -> None:
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(RunError, match=message):
            SafetensorsStore(tmp_path)

    refused(index["weight_map"] | {"c": second}, f"c is not in {second}")
    refused({"a": second, "b": first}, "which the index names for it")
    refused({"a": first, "b": "../b.safetensors"}, "files in the same folder")
    refused([], "is damaged")
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / second)
    refused(index["weight_map"], f"a is in two files: .*{first} and .*{second}")
    save_file({"b": torch.zeros(2), "c": torch.zeros(2)}, tmp_path / second)
    refused(index["weight_map"], f"{second}: c is not in model.safetensors.index.json")
    (tmp_path / second).unlink()
    refused(index["weight_map"], f"{second} is missing, which model.safetensors.index.json names for b")
    path.write_text("{")
    with pytest.raises(RunError, match=r"index.json: is damaged"):
        SafetensorsStore(tmp_path)
