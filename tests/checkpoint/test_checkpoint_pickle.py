"""A checkpoint from a stranger must not run code, whatever its checksums say."""

import collections
import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from dmoe.checkpoint import load_latest, save_checkpoint, verify_checkpoint
from dmoe.checkpoint.dcp_io import read_dcp_metadata, read_tensors
from dmoe.errors import RunError


class Attack:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def forge(folder: Path, content: bytes, name: str = ".metadata") -> None:
    """Replace a file and correct the manifest, as an attacker would."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.full((3,), float(step))}})
    return tmp_path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_os_system_is_refused_and_not_run(run, tmp_path, protocol):
    marker = tmp_path / "owned"
    newest = run / "checkpoints" / "step-00000002"
    attack = pickle.dumps({"a": Attack(os.system, f"touch {marker}")}, protocol=protocol)
    forge(newest, attack)
    with pytest.raises(RunError, match=r"\.metadata is refused: it would load (posix|nt)\.system"):
        verify_checkpoint(newest)
    refused: list[str] = []
    state = {"model": {"w": torch.zeros(3)}}
    assert load_latest(run, state, on_refused=refused.append) == (1, {})
    assert state["model"]["w"].tolist() == [1.0, 1.0, 1.0]
    assert len(refused) == 1
    assert not marker.exists()
    pickle.loads(attack)  # the attack is a real one
    assert marker.exists()


@pytest.mark.parametrize(
    "attack",
    [
        Attack(eval, "1+1"),
        Attack(getattr, torch.Size, "__init__"),
        Attack(collections.OrderedDict),
        Attack(torch.load, "x"),
        Attack(pickle.loads, b"N."),
    ],
    ids=["eval", "getattr", "OrderedDict", "torch.load", "pickle.loads"],
)
def test_other_callables_are_refused(run, attack):
    forge(run / "checkpoints" / "step-00000002", pickle.dumps(attack))
    with pytest.raises(RunError, match=r"\.metadata"):
        verify_checkpoint(run / "checkpoints" / "step-00000002")


@pytest.mark.parametrize("name", ["Size.__init__.__globals__", "serialization.os.system", "float32.__class__"])
def test_dotted_names_are_refused(run, name):
    # Protocol 4 walks the dots of a name, so an admitted module must not admit what hangs on it.
    content = b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    forge(run / "checkpoints" / "step-00000002", content)
    with pytest.raises(RunError, match="is refused: it would load torch"):
        verify_checkpoint(run / "checkpoints" / "step-00000002")


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({"x": 1}), b"\x80\x04."])
def test_garbage_metadata_is_damage(run, content):
    forge(run / "checkpoints" / "step-00000002", content)
    with pytest.raises(RunError, match=r"\.metadata (cannot be read|is damaged)"):
        verify_checkpoint(run / "checkpoints" / "step-00000002")


def test_metadata_may_not_point_outside_the_folder(run):
    folder = run / "checkpoints" / "step-00000002"
    metadata = read_dcp_metadata(folder)
    metadata.storage_meta = None
    for info in metadata.storage_data.values():
        info.relative_path = "../step-00000001/__0_0.distcp"
    forge(folder, pickle.dumps(metadata))
    with pytest.raises(RunError, match="is needed but not listed"):
        verify_checkpoint(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # DCP itself, called here without our wrapper
def test_pickled_value_instead_of_a_tensor_is_refused(run, tmp_path):
    """DCP reads what is not a tensor with an unrestricted torch.load; such an entry must never get there."""
    import torch.distributed.checkpoint as dcp

    marker = tmp_path / "owned"
    folder = tmp_path / "foreign"
    dcp.save({"model": {"w": Attack(os.system, f"touch {marker}")}}, checkpoint_id=folder)
    with pytest.raises(RunError, match=r"model\.w is not a tensor"):
        read_tensors(folder, read_dcp_metadata(folder), {"model.w": torch.zeros(3)})
    newest = run / "checkpoints" / "step-00000002"
    for name in (".metadata", "__0_0.distcp"):
        forge(newest, (folder / name).read_bytes(), name)
    refused: list[str] = []
    assert load_latest(run, {"model": {"w": torch.zeros(3)}}, on_refused=refused.append) == (1, {})
    assert "model.w is not a tensor" in refused[0]
    assert not marker.exists()
    dcp.load({"model": {"w": torch.zeros(3)}}, checkpoint_id=folder)  # the attack is a real one
    assert marker.exists()
