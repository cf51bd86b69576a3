"""A rank of test_checkpoint_reshard.py: saves on 4 ranks in each layout, then loads on 4, 2 and 1 in each layout."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from reshard_model import LAYOUTS, E, F, everything, lay_out, part_of, train
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dmoe.checkpoint import (
    load_latest,
    load_model_weights,
    restore_training_state,
    save_checkpoint,
    training_state,
    verify_checkpoint,
)
from dmoe.checkpoint.dcp_io import read_dcp_metadata
from dmoe.checkpoint.stored_form import stored_form
from dmoe.errors import ConfigError, RunError
from dmoe.ops.collectives import leave_process_group


def world(size: int) -> list[str]:
    return [name for name, layout in LAYOUTS.items() if layout["world"] == size]


def fail(message: str) -> None:
    raise AssertionError(message)


def save_all(folder: Path, size: int) -> None:
    for name in world(size):
        parts, optimizer = lay_out(LAYOUTS[name], name)
        train(parts, optimizer, 2)
        if name == "fsdp4":
            parts[0].unshard()  # as an evaluation may leave it
        save_checkpoint(folder / name, 2, training_state(parts, optimizer) | {"trainer": {"layout": name}})
        remember(folder / f"{name}.pt", parts, optimizer)
        if not dist.is_initialized() or dist.get_rank() == 0:
            check_files(folder / name / "checkpoints" / "step-00000002", LAYOUTS[name])


def remember(file: Path, parts: list, optimizer: torch.optim.Optimizer) -> None:
    """Put together what the ranks hold, from the parts themselves, and write it for the processes that load."""
    full: dict[str, torch.Tensor] = {}
    for name, tensor in everything(parts, optimizer).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(part_of(whole, tensor), local), f"full_tensor of {name}"
        full[name.split(" ", 1)[1]] = whole
    found = [full]
    if dist.is_initialized():
        found = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, full)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({k: v for ranks in found for k, v in ranks.items()}, file)
    if dist.is_initialized():
        dist.barrier()


def check_files(path: Path, layout: dict) -> None:
    """Each box is written once, by one rank, and no rank writes all."""
    metadata = read_dcp_metadata(path)
    for name, entry in metadata.state_dict_metadata.items():
        numels = [torch.Size(chunk.sizes).numel() for chunk in entry.chunks]
        assert sum(numels) == torch.Size(entry.size).numel(), name
    sizes = {p.name: p.stat().st_size for p in path.glob("*.distcp")}
    assert sum(info.length for info in metadata.storage_data.values()) == sum(sizes.values()), "written twice"
    assert len(sizes) == layout["world"]
    assert max(sizes.values()) < 1.6 * sum(sizes.values()) / len(sizes), sizes
    shape = metadata.state_dict_metadata["model.layers.0.experts.gate_up_proj"].size
    assert list(shape) == [E, 2, F, 4]
    moment = metadata.state_dict_metadata["optimizer.state.layers.3.experts.gate_up_bias.exp_avg_sq"]
    assert list(moment.size) == [E, 2, F]


def check(name: str, file: Path, parts: list, optimizer: torch.optim.Optimizer, *, weights_only: bool = False) -> None:
    full = torch.load(file)
    found = everything(parts, optimizer)
    assert len(found) > 10
    for key, tensor in found.items():
        _, parameter, *state = key.split(" ")
        if weights_only and state:
            continue
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        expected = part_of(full[" ".join([parameter, *state])], tensor)
        assert torch.equal(local, expected), f"{key} from {file.stem} in {name}"


def load_all(folder: Path, size: int) -> None:
    """Each layout of this size loads some of the checkpoints, and each checkpoint is loaded by some; one loads all."""
    for number, name in enumerate(world(size)):
        for index, saved in enumerate(world(4)):
            if (number + index) % {4: 4, 2: 3, 1: 1}[size] != 1 % size:
                continue
            parts, optimizer = lay_out(LAYOUTS[name], "other")
            if index % 2:  # into moments that a step has made, and into those of before the first step
                train(parts, optimizer, 1)
            state = training_state(parts, optimizer)
            file = folder / f"{saved}.pt"
            result = load_latest(folder / saved, state, on_refused=fail)
            assert result == (2, {"layout": saved})
            restore_training_state(parts, optimizer, state)
            check(name, file, parts, optimizer)
            assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
        if name not in ("ep2_replicate2", "pp2_v", "one"):
            continue
        restore_copies(name, file, parts, optimizer)
        weights, unused = lay_out(LAYOUTS[name], "other")
        assert load_model_weights(folder / saved, weights) == 2
        check(name, folder / f"{saved}.pt", weights, unused, weights_only=True)


def restore_copies(name: str, file: Path, parts: list, optimizer: torch.optim.Optimizer) -> None:
    """From a copy on other storage, and from one in the form of the file."""
    state = training_state(parts, optimizer)
    other_form = {k: stored_form(k, v) for k, v in state["model"].items()}
    for model in (state["model"], other_form):
        fresh = lay_out(LAYOUTS[name], "third")
        copied = {k: v.clone() for k, v in model.items()}
        restore_training_state(*fresh, {"model": copied, "optimizer": copy.copy(state["optimizer"])})
        check(name, file, *fresh)


def refusals(folder: Path) -> None:
    """Wrong requests are errors on every rank, also if only one makes them."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (4,))
    name = "experts.gate_up_proj"
    full = torch.arange(48.0).reshape(2, 12, 2)
    for placement in (Shard(1), _StridedShard(1, split_factor=3)):
        tensor = DTensor.from_local(
            full[:, :3], mesh, [placement], run_check=False, shape=full.shape, stride=(24, 2, 1)
        )
        with pytest.raises(ConfigError, match=r"model\.experts\.gate_up_proj is \[2, 12, 2\] laid out as"):
            save_checkpoint(folder / "refused", 1, {"model": {name: tensor}})
    strided = DTensor.from_local(
        torch.zeros(2, 2), mesh, [_StridedShard(0, split_factor=2)], run_check=False, shape=(8, 2), stride=(2, 1)
    )
    with pytest.raises(ConfigError, match="must be a layout in which each rank has one box"):
        save_checkpoint(folder / "refused", 1, {"model": {"w": strided}})
    bad = {"model": {"w": distribute_tensor(full, mesh, [Shard(1)])}}
    if dist.get_rank() == 2:
        bad["trainer"] = {"x": object()}
    with pytest.raises(TypeError, match=r"trainer\.x is neither"):
        save_checkpoint(folder / "refused", 1, bad)
    assert not (folder / "refused").exists()

    # A parameter that only the last pipeline stage holds is trained in another group there.
    parts, optimizer = lay_out(LAYOUTS["pp2_fsdp2"], "x")
    if hasattr(parts[0], "norm"):
        take(optimizer, parts[0].norm.weight)
    state = training_state(parts, optimizer)
    assert load_latest(folder / "pp2_tp2", lay_state("pp2_tp2"), on_refused=fail) is not None
    with pytest.raises(ConfigError, match=r"optimizer\.state\.norm\.weight\.\S+ is in checkpoint"):
        load_latest(folder / "pp2_tp2", state, on_refused=fail)
    parts, optimizer = lay_out(LAYOUTS["pp2_fsdp2"], "x")
    saved = training_state(parts, optimizer)
    if hasattr(parts[0], "norm"):
        optimizer.add_param_group({"params": []})
    with pytest.raises(ConfigError, match="param_groups has length"):
        training_state(parts, optimizer)
    if hasattr(parts[0], "norm"):
        optimizer.param_groups.pop()
        optimizer.param_groups[0]["params"].append(take(optimizer, parts[0].norm.weight))
    with pytest.raises(ConfigError, match=r"param_groups\.0 differs from the checkpoint's in norm\.weight"):
        restore_training_state(parts, optimizer, saved)
    parts, optimizer = lay_out(LAYOUTS["pp2_fsdp2"], "x")
    if hasattr(parts[0], "norm"):
        saved["model"]["norm.weight"] = torch.zeros(5)
    with pytest.raises(ConfigError, match=r"another model: norm\.weight has shape \[4\]: must be \[5\]"):
        restore_training_state(parts, optimizer, saved)


def take(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.Tensor:
    group = optimizer.param_groups[1]
    group["params"] = [p for p in group["params"] if p is not parameter]
    return parameter


def lay_state(name: str) -> dict:
    return training_state(*lay_out(LAYOUTS[name], "other"))


def damage(folder: Path) -> None:
    """A file that is altered is found whichever rank checks it, and every rank refuses."""
    path = folder / "fsdp4" / "checkpoints" / "step-00000002"
    for file in sorted(path.glob("*.distcp")):
        content = file.read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        dist.barrier()
        with pytest.raises(RunError, match=r"all 1 checkpoints in .* are damaged"):
            load_latest(folder / "fsdp4", lay_state("fsdp4"), on_refused=lambda m, f=file: check_message(m, f.name))
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(content)
            verify_checkpoint(path)
        dist.barrier()


def check_message(message: str, name: str) -> None:
    assert f"{name} is altered" in message, message


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for size in (4, 2, 1):
        if rank >= size:
            return
        if size > 1:
            store = dist.FileStore(str(folder / f"store{size}"), size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        if size == 4:
            save_all(folder, size)
            refusals(folder)
            damage(folder)
        load_all(folder, size)
        if size > 1:
            dist.barrier()
            leave_process_group()
