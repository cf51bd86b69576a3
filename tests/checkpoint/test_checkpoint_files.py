"""Saving, finding, verifying, loading and pruning, with damage of every kind."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from dmoe.checkpoint import find_checkpoints, load_checkpoint, load_latest, save_checkpoint, verify_checkpoint
from dmoe.errors import ConfigError, RunError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def make_state(seed: int) -> dict:
    torch.manual_seed(seed)
    tensors = {str(dtype).removeprefix("torch."): (torch.randn(5, 7) * 40).to(dtype) for dtype in DTYPES}
    odd = {
        "scalar": torch.tensor(float(seed)),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(4, 6).t(),
        "slice": torch.randn(10, 10)[2:4, ::3],
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }
    groups = [{"lr": 0.1 + seed, "betas": (0.9, 0.95), "params": ["a.b"]}, {"lr": torch.tensor(0.25), "fused": None}]
    trainer = {"step": seed, "loss": 1 / 3, "history": [1, 2.5, "x", None], "nested": {"best": float("inf")}}
    return {
        "model": {"a.b": torch.randn(3), **tensors, **odd},
        "optimizer": {"param_groups": groups},
        "trainer": trainer,
    }


def blank(state: dict) -> dict:
    """The same form with other content, on other storage."""
    model = {k: torch.empty(v.shape, dtype=v.dtype).fill_(1) for k, v in state["model"].items()}
    groups = [{"lr": 7.0, "betas": (0.0, 0.0), "params": []}, {"lr": torch.tensor(7.0), "fused": True}]
    return {"model": model, "optimizer": {"param_groups": groups}}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_loaded(loaded: dict, saved: dict) -> None:
    for name, want in saved["model"].items():
        got = loaded["model"][name]
        assert got.dtype == want.dtype, name
        assert torch.equal(as_bytes(got), as_bytes(want)), name
    (first, second), (want_first, want_second) = loaded["optimizer"]["param_groups"], saved["optimizer"]["param_groups"]
    assert first == want_first
    assert isinstance(first["betas"], tuple)
    assert torch.equal(second["lr"], want_second["lr"])
    assert second["fused"] is None


def refuse_nothing(message: str) -> None:
    raise AssertionError(f"refused: {message}")


def flip_byte(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of the steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, make_state(step), keep=2)
    return tmp_path


def test_round_trip_is_bit_exact_and_silent(tmp_path):
    state = make_state(250)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save_checkpoint(tmp_path, 250, state)
        loaded = blank(state)
        before = {name: tensor.data_ptr() for name, tensor in loaded["model"].items()}
        result = load_latest(tmp_path, loaded, on_refused=refuse_nothing)
    assert path == tmp_path / "checkpoints" / "step-00000250"
    assert result == (250, state["trainer"])
    assert_loaded(loaded, state)
    assert {name: tensor.data_ptr() for name, tensor in loaded["model"].items()} == before, "not in place"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000250\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", "step-00000250"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["torch"], manifest["format_version"]) == (250, torch.__version__, 1)
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}


def test_no_pickled_values_in_the_checkpoint(tmp_path):
    from dmoe.checkpoint.dcp_io import read_dcp_metadata

    path = save_checkpoint(tmp_path, 1, make_state(1))
    kinds = {type(entry).__name__ for entry in read_dcp_metadata(path).state_dict_metadata.values()}
    assert kinds == {"TensorStorageMetadata"}


def test_keep_and_order(tmp_path):
    for step in (10, 9, 100_000_000, 11, 12):  # not in order, and one with nine digits
        save_checkpoint(tmp_path, step, make_state(step), keep=3)
    names = [p.name for p in find_checkpoints(tmp_path)]
    assert names == ["step-100000000", "step-00000012", "step-00000011"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000012\n"


def test_damaged_checkpoint_does_not_push_out_a_whole_one(run):
    (run / "checkpoints" / "step-00000002" / "__0_0.distcp").write_bytes(b"")
    save_checkpoint(run, 3, make_state(3), keep=2)
    assert [p.name for p in find_checkpoints(run)] == ["step-00000003", "step-00000002", "step-00000001"]


def test_the_one_just_written_stays_even_if_newer_ones_exist(run):
    save_checkpoint(run, 0, make_state(0), keep=1)
    assert "step-00000000" in [p.name for p in find_checkpoints(run)]


def test_same_step_is_replaced(run):
    new = make_state(77)
    save_checkpoint(run, 2, new)
    loaded = blank(new)
    assert load_latest(run, loaded, on_refused=refuse_nothing) == (2, new["trainer"])
    assert_loaded(loaded, new)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_leftovers_of_dead_writers_go_and_those_of_live_ones_stay(run):
    root = run / "checkpoints"
    dead, own, live = (root / f".tmp-step-00000009-{pid}" for pid in (2**22 + 5, os.getpid(), os.getppid()))
    for folder in (dead, own, live):
        folder.mkdir()
        (folder / "x").write_text("x")
    (root / f".tmp-latest-{2**22 + 5}").write_text("x")
    save_checkpoint(run, 3, make_state(3))
    assert [p.name for p in root.iterdir() if p.name.startswith(".tmp")] == [live.name]


DAMAGES = {
    "first data byte": (lambda c: flip_byte(c / "__0_0.distcp", 0), "__0_0.distcp is altered"),
    "last data byte": (lambda c: flip_byte(c / "__0_0.distcp", -1), "__0_0.distcp is altered"),
    "metadata byte": (lambda c: flip_byte(c / ".metadata", 60), ".metadata is altered"),
    "trainer byte": (lambda c: flip_byte(c / "trainer.json", 30), "trainer.json is altered"),
    "truncated": (lambda c: os.truncate(c / "__0_0.distcp", 100), "__0_0.distcp is truncated: 100 bytes, expected"),
    "longer": (lambda c: (c / "trainer.json").open("a").write(" ") and None, "trainer.json is too long"),
    "missing data": (lambda c: (c / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "missing metadata": (lambda c: (c / ".metadata").unlink(), ".metadata is missing"),
    "missing trainer": (lambda c: (c / "trainer.json").unlink(), "trainer.json is missing"),
    "missing manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    "garbage manifest": (lambda c: (c / "manifest.json").write_bytes(b"\xff\x00{"), "manifest.json is damaged"),
    "empty manifest": (lambda c: (c / "manifest.json").write_text(""), "manifest.json is damaged"),
    "manifest of another kind": (lambda c: (c / "manifest.json").write_text("[1]"), "manifest.json is damaged"),
    "manifest without data": (lambda c: edit_manifest(c, lambda m: m["files"].pop("__0_0.distcp")), "is needed but"),
    "manifest without metadata": (lambda c: edit_manifest(c, lambda m: m["files"].pop(".metadata")), "is needed but"),
    "manifest of another step": (lambda c: edit_manifest(c, lambda m: m.update(step=9)), "manifest.json is of step 9"),
    "newer format": (lambda c: edit_manifest(c, lambda m: m.update(format_version=2)), "format version 2 is newer"),
    "path in manifest": (lambda c: edit_manifest(c, lambda m: m["files"].update({"../x": {}})), "not a file name"),
}


def edit_manifest(folder: Path, edit) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_older_checkpoint_is_used(run, damage):
    newest = run / "checkpoints" / "step-00000002"
    verify_checkpoint(newest)
    inflict, message = DAMAGES[damage]
    inflict(newest)
    with pytest.raises(RunError, match=message.replace(".", r"\.")) as error:
        verify_checkpoint(newest)
    assert "\n" not in str(error.value)
    refused: list[str] = []
    state = make_state(1)
    loaded = blank(state)
    assert load_latest(run, loaded, on_refused=refused.append) == (1, state["trainer"])
    assert_loaded(loaded, state)
    assert len(refused) == 1
    assert "step-00000002 is refused" in refused[0]
    assert message in refused[0]


def test_all_damaged_is_an_error_and_none_at_all_is_none(run, tmp_path):
    for path in find_checkpoints(run):
        flip_byte(path / "__0_0.distcp", 200)
    refused: list[str] = []
    with pytest.raises(RunError, match=r"all 2 checkpoints in .* are damaged"):
        load_latest(run, blank(make_state(0)), on_refused=refused.append)
    assert len(refused) == 2
    empty = tmp_path / "empty"
    assert load_latest(empty, blank(make_state(0)), on_refused=refuse_nothing) is None
    assert find_checkpoints(empty) == []


@pytest.mark.parametrize("latest", [None, "step-00000099\n", "", "../../etc\n"])
def test_loading_does_not_depend_on_the_latest_file(run, latest):
    file = run / "checkpoints" / "latest"
    file.unlink() if latest is None else file.write_text(latest)
    result = load_latest(run, blank(make_state(0)), on_refused=refuse_nothing)
    assert result is not None
    assert result[0] == 2
    save_checkpoint(run, 3, make_state(3))
    assert file.read_text() == "step-00000003\n"


def test_folder_without_manifest_is_not_a_checkpoint(run):
    (run / "checkpoints" / "step-00000005").mkdir()
    (run / "checkpoints" / "step-x").mkdir()
    (run / "checkpoints" / "step-00000006").write_text("a file")
    assert [p.name for p in find_checkpoints(run)] == ["step-00000002", "step-00000001"]


def test_mismatch_is_a_config_error_not_damage(run):
    def loading(change) -> None:
        state = blank(make_state(0))
        change(state["model"])
        load_latest(run, state, on_refused=refuse_nothing)

    with pytest.raises(ConfigError, match=r"model\.float32 has shape \[5, 8\]: must be \[5, 7\]"):
        loading(lambda m: m.update(float32=torch.zeros(5, 8)))
    with pytest.raises(ConfigError, match=r"model\.float32 is torch\.bfloat16: must be torch\.float32"):
        loading(lambda m: m.update(float32=torch.zeros(5, 7, dtype=torch.bfloat16)))
    with pytest.raises(ConfigError, match=r"model\.extra is not in checkpoint"):
        loading(lambda m: m.update(extra=torch.zeros(1)))
    with pytest.raises(ConfigError, match=r"model\.float32 is in checkpoint .* and not in this run"):
        loading(lambda m: m.pop("float32"))
    state = blank(make_state(0))
    state["optimizer"]["param_groups"].insert(0, {"lr": 1.0})
    with pytest.raises(ConfigError, match="param_groups"):
        load_latest(run, state, on_refused=refuse_nothing)


def test_one_section_of_a_named_checkpoint(run):
    saved = make_state(1)
    loaded = {"model": blank(saved)["model"], "trainer": {}}
    path = run / "checkpoints" / "step-00000001"
    assert load_checkpoint(path, loaded) == (1, saved["trainer"])
    assert loaded["trainer"] == saved["trainer"]
    moved = path.rename(run / "best")  # a copy under another name is still a checkpoint
    assert load_checkpoint(moved, loaded)[0] == 1


def test_bad_arguments(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep is 0: must be at least 1"):
        save_checkpoint(tmp_path, 1, make_state(1), keep=0)
    with pytest.raises(TypeError, match=r"trainer\.when is neither a tensor nor JSON"):
        save_checkpoint(tmp_path, 1, {"trainer": {"when": object()}})
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot write checkpoint .*step-00000001: Not a directory; "):
        save_checkpoint(tmp_path / "file", 1, make_state(1))


def test_interrupt_while_writing_stays_an_interrupt(run, monkeypatch):
    from dmoe.checkpoint import dcp_io

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp_io.dcp.FileSystemWriter, "write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(run, 3, make_state(3))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000001", "step-00000002"]
