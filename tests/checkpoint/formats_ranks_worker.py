"""A rank of test_formats_ranks.py: loads a Hugging Face directory in each layout, checks its part, and saves it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dmoe
from dmoe.checkpoint import save_checkpoint
from dmoe.checkpoint.formats import load_into, read_config
from dmoe.checkpoint.formats.mapped import MappedSource
from dmoe.checkpoint.formats.names import has_expert_rows
from dmoe.checkpoint.parts import model_tensors
from dmoe.config import ParallelConfig, RunConfig, TrainConfig, config_to_yaml
from dmoe.errors import ConfigError
from dmoe.moe.sharded import local, owned_indices
from dmoe.ops.collectives import leave_process_group
from dmoe.parallel import build_mesh, parallelize

# Where experts lie: whole ones over ranks; over ranks by FSDP; gate and up rows of each; some layers each.
LAYOUTS = {
    "ep2": ParallelConfig(ep=2),
    "fsdp2": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "pp2": ParallelConfig(pp=2),
}
# A tied head differs where the embedding is split or on two stages.
RUNS = [*(("mixtral", name) for name in LAYOUTS), ("tied", "tp2"), ("tied", "pp2")]
TRAIN = TrainConfig(batch_size=4, micro_batch_size=2, seq_len=8)


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    for case in ("mixtral", "tied"):
        whole = dmoe.from_pretrained(Path(folder) / case).state_dict()
        for name, layout in LAYOUTS.items():
            if (case, name) not in RUNS:
                continue
            try:
                check(Path(folder), case, name, build_mesh(layout), whole, rank)
            except Exception as error:
                raise RuntimeError(f"{case} in {name} on rank {rank}") from error
    refusals(Path(folder), build_mesh(LAYOUTS["ep2"]))
    leave_process_group()


def check(folder: Path, case: str, name: str, mesh: Any, whole: dict[str, torch.Tensor], rank: int) -> None:
    config = read_config(folder / case)
    parts = parallelize(config, mesh, TRAIN)
    for part in parts:
        part.to_empty(device="cpu")
    with Reads() as reads:
        load_into(parts, folder / case)
    found = model_tensors(list(parts))
    assert equal_parts(found, whole) > 8
    experts = {(n, i) for n, i in reads.done if has_expert_rows(n)}
    share = 1 if name == "tp2" else 2  # of the experts that a rank has a part of
    assert len(experts) == len([n for n in whole if has_expert_rows(n)]) * config.moe.num_experts // share
    assert all(index is not None for _, index in experts)
    assert len(reads.done) == len(set(reads.done)), "read twice"

    run = folder / f"{case}-{name}"
    save_checkpoint(run, 7, {"model": {n: tensors[0] for n, tensors in found.items()}})
    if rank == 0:
        (run / "config.yaml").write_text(config_to_yaml(RunConfig(model=config, train=TRAIN, data=BYTES)))
    dist.barrier()
    # From a run, and by the one call for it.
    if name != "pp2":
        model = dmoe.from_pretrained(run, mesh=mesh, dtype=torch.bfloat16)
        assert not model.training
        assert equal_parts(model_tensors([model]), {n: t.bfloat16() for n, t in whole.items()}) > 8


BYTES = RunConfig().data.__class__(tokenizer="bytes")


def equal_parts(found: dict[str, list[torch.Tensor]], whole: dict[str, torch.Tensor]) -> int:
    for name, tensors in found.items():
        for tensor in tensors:
            wanted = whole[name]
            for dim, runs in enumerate(owned_indices(tensor)):
                indices = [i for run in runs for i in run]
                wanted = wanted.index_select(dim, torch.tensor(indices, dtype=torch.long))
            assert wanted.numel() == local(tensor).numel() > 0, name
            assert torch.equal(local(tensor), wanted), name
    return len(found)


class Reads:
    """Which of our tensors and rows are read from a source, in order."""

    def __enter__(self) -> Reads:
        self.done: list[tuple[str, int | None]] = []
        self.original = MappedSource.read
        reads = self

        def read(source: MappedSource, name: str, index: int | None = None) -> torch.Tensor:
            reads.done.append((name, index))
            return reads.original(source, name, index)

        MappedSource.read = read  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: Any) -> None:
        MappedSource.read = self.original  # type: ignore[method-assign]


def refusals(folder: Path, mesh: Any) -> None:
    from dataclasses import replace

    config = read_config(folder / "mixtral")
    with pytest.raises(ValueError, match="on the meta device"):
        load_into(parallelize(config, mesh, TRAIN), folder / "mixtral")
    wide = parallelize(replace(config, moe=replace(config.moe, intermediate_size=32)), mesh, TRAIN)
    deep = parallelize(replace(config, num_layers=3), mesh, TRAIN)
    for parts, message in (
        (
            wide,
            r"the shape of layers\.0\.mlp\.experts\.gate_up_proj is \[6, 64, 32\]: must be \[6, 48, 32\]",
        ),
        (deep, r"layers\.2\.\S+ is only in the model"),
    ):
        parts[0].to_empty(device="cpu")
        with pytest.raises(ConfigError, match=message):
            load_into(parts, folder / "mixtral")
    with pytest.raises(ConfigError, match=r"parallel.pp is 2: must be 1"):
        dmoe.from_pretrained(folder / "mixtral", mesh=build_mesh(LAYOUTS["pp2"]))
