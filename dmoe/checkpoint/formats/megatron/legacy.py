"""Megatron's older checkpoints: a folder and a torch.save file a rank, `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`.

TT, PPP and EEE are the ranks of tensor, pipeline and expert parallelism; the last two are named only where there is
more than one. What several ranks hold in full is read from the first, and must be equal on the others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.formats.mapping import Mapping, Stored
from dmoe.checkpoint.formats.megatron import torch_files
from dmoe.checkpoint.formats.megatron.assemble import assemble
from dmoe.checkpoint.formats.megatron.folders import RANK_FILE
from dmoe.checkpoint.formats.megatron.fork import refuse_whole_model
from dmoe.checkpoint.formats.megatron.names import Form, Rank, is_expert, is_split, rank_mapping
from dmoe.checkpoint.formats.store import Source
from dmoe.config import ModelConfig, require
from dmoe.errors import ConfigError, RunError

_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_WITHOUT_WEIGHTS = ("_extra_state", "inv_freq")
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    chunks: int = 1
    """Parts of the model on each rank of pipeline parallelism (virtual stages); layers go round the ranks in turn."""
    first_layers: int = 0
    """Layers of the first rank of pipeline parallelism; 0: as many as the others."""
    last_layers: int = 0
    """The same of the last."""

    def folder(self, t: int, p: int, e: int) -> str:
        return f"mp_rank_{t:02d}" + (f"_{p:03d}" if self.pp > 1 else "") + (f"_{e:03d}" if self.ep > 1 else "")

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError for sizes that the model cannot be split by."""
        for name in ("tp", "pp", "ep", "chunks"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        E = config.moe.num_experts if config.moe_layers() else 1
        require(E % self.ep == 0, "ep", self.ep, f"a divisor of the number of experts ({E})")
        fixed = [n for n in (self.first_layers, self.last_layers) if n]
        left, stages = config.num_layers - sum(fixed), self.pp * self.chunks - len(fixed)
        fits = self.pp > len(fixed) and not (fixed and self.chunks > 1) and left > 0 and left % stages == 0
        if not (fits or (stages == left == 0)):
            require(False, "pp", self.pp, f"a divisor of the layers ({config.num_layers}), virtual stages and all")

    def stages(self, config: ModelConfig) -> list[tuple[int, int, range]]:
        """(rank of pipeline parallelism, chunk on it, layers), in the order of the layers."""
        places = [(p, c) for c in range(self.chunks) for p in range(self.pp)]
        sizes = dict.fromkeys(places, 0)
        fixed = {(0, 0): self.first_layers, (self.pp - 1, 0): self.last_layers}
        fixed = {place: n for place, n in fixed.items() if n}
        each = (config.num_layers - sum(fixed.values())) // max(1, len(places) - len(fixed))
        result, start = [], 0
        for place in sizes:
            n = fixed.get(place, each)
            result.append((*place, range(start, start + n)))
            start += n
        return result


@dataclass(frozen=True)
class Entry:
    """A tensor of a rank's file, `folder/model[chunk]/name`."""

    stored: Stored
    first: str
    """The name of the same tensor on the first rank that has it: its own, or it is a copy."""


def entries(config: ModelConfig, layout: Layout, form: Form) -> list[Entry]:
    """Every tensor of every rank, a file at a time."""
    layout.check(config)
    stages = layout.stages(config)
    num_experts = config.moe.num_experts // layout.ep
    result = []
    for t, p, e in ((t, p, e) for p in range(layout.pp) for e in range(layout.ep) for t in range(layout.tp)):
        for place, (stage, chunk, layers) in enumerate(stages):
            if stage != p:
                continue
            experts = range(e * num_experts, (e + 1) * num_experts)
            rank = Rank(layers, experts, t, layout.tp, first=place == 0, last=place == len(stages) - 1)
            for stored in rank_mapping(config, rank, form):
                name, first = stored.name, stored.name
                key = _model_key(chunk, layout)
                if name == HEAD and config.tie_embeddings:
                    first, stage, chunk = EMBEDDING, 0, 0
                at = layout.folder(t if is_split(name) else 0, stage, e if is_expert(name) else 0)
                full = f"{layout.folder(t, p, e)}/{key}/{name}"
                result.append(Entry(replace(stored, name=full), f"{at}/{_model_key(chunk, layout)}/{first}"))
    return result


def _model_key(chunk: int, layout: Layout) -> str:
    return "model" if layout.chunks == 1 else f"model{chunk}"


def mapping(config: ModelConfig, layout: Layout, form: Form) -> list[Stored]:
    """The tensors of all files without copies: each of ours once."""
    return [entry.stored for entry in entries(config, layout, form) if entry.stored.name == entry.first]


class RankFiles:
    """The files of all ranks. Tensors are mapped from disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = {path.name: path / RANK_FILE for path in sorted(folder.glob("mp_rank_*")) if path.is_dir()}
        self.states: dict[str, dict[str, Any]] = {}
        for name, file in found.items():
            if _FOLDER.fullmatch(name) is None:
                raise RunError(f"{folder / name}: is no folder of a rank: must be mp_rank_TT[_PPP][_EEE]")
            state = torch_files.load(file)
            if not isinstance(state, dict) or not isinstance(state.get("model", state.get("model0")), dict):
                raise RunError(f"{file}: has no state dict under 'model'")
            refuse_whole_model(folder, state.get("model", {}))
            self.states[name] = state

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of the run, or nothing."""
        args = next(iter(self.states.values())).get("args")
        return {} if args is None or isinstance(args, torch_files.Opaque) else torch_files.plain(args)

    def tensors(self) -> dict[str, Tensor]:
        """By `folder/model[chunk]/name`."""
        result = {}
        for folder, state in self.states.items():
            for key in state:
                if re.fullmatch(r"model\d*", key) is None:
                    continue
                for name, value in state[key].items():
                    if isinstance(value, Tensor) and not name.endswith(_WITHOUT_WEIGHTS):
                        result[f"{folder}/{key}/{name}"] = value
        return result

    def layout(self) -> Layout:
        """By the arguments where the files have them, else by the names of the folders.

        Raises ConfigError for a layout that is not read, RunError for files that are not there.
        """
        args = self.args
        chunks = sum(re.fullmatch(r"model\d+", key) is not None for key in next(iter(self.states.values()))) or 1
        ranks = [_FOLDER.fullmatch(name).groups() for name in self.states]  # type: ignore[union-attr]
        counts = [len({rank[i] for rank in ranks}) for i in range(3)]
        if args:
            _check_args(args)
            layout = Layout(
                tp=args.get("tensor_model_parallel_size") or counts[0],
                pp=args.get("pipeline_model_parallel_size") or 1,
                ep=args.get("expert_model_parallel_size") or 1, chunks=chunks,
                first_layers=args.get("decoder_first_pipeline_num_layers") or 0,
                last_layers=args.get("decoder_last_pipeline_num_layers") or 0,
            )  # fmt: skip
        elif ranks[0][1] is None:
            layout = Layout(tp=counts[0])
        elif ranks[0][2] is not None:
            layout = Layout(tp=counts[0], pp=counts[1], ep=counts[2], chunks=chunks)
        else:  # pipeline or expert parallelism: each rank of the latter has an embedding
            last = max(self.states)
            key = "model" if chunks == 1 else "model0"
            many = EMBEDDING in self.states[last][key] and counts[1] > 1
            layout = Layout(tp=counts[0], pp=1 if many else counts[1], ep=counts[1] if many else 1, chunks=chunks)
        self._check_folders(layout)
        return layout

    def _check_folders(self, layout: Layout) -> None:
        wanted = {layout.folder(t, p, e) for t in range(layout.tp) for p in range(layout.pp) for e in range(layout.ep)}
        if missing := sorted(wanted - self.states.keys()):
            raise RunError(f"{self.folder}: {len(missing)} folders of ranks are missing: {', '.join(missing[:10])}")
        if extra := sorted(self.states.keys() - wanted):
            sizes = f"tp {layout.tp}, pp {layout.pp}, ep {layout.ep}"
            raise RunError(f"{self.folder}: {', '.join(extra[:10])} are of no rank of {sizes}")

    def form(self, layout: Layout) -> Form:
        """Which names the files use."""
        tensors = self.tensors()
        ends = {name.rsplit("/", 1)[-1] for name in tensors}
        experts = "sequential"
        if any(name.endswith("mlp.experts.weight1") for name in ends):
            experts = "weight1"
        elif any(name.endswith("mlp.experts.linear_fc1.weight0") for name in ends):
            experts = "grouped"
        embedding = next((t for name, t in tensors.items() if name.endswith(f"/{EMBEDDING}")), None)
        if embedding is None:
            raise RunError(f"{self.folder}: no rank has {EMBEDDING}")
        norms = "te" if any(name.endswith("linear_qkv.layer_norm_weight") for name in ends) else "local"
        return Form(embedding.shape[0] * layout.tp, norms, experts)  # type: ignore[arg-type]


def _check_args(args: dict[str, Any]) -> None:
    etp, tp = args.get("expert_tensor_parallel_size"), args.get("tensor_model_parallel_size")
    if etp not in (None, tp):
        raise ConfigError(
            f"Megatron's expert_tensor_parallel_size is {etp!r}: must be tensor_model_parallel_size ({tp}) in files a "
            "rank; save the run with --ckpt-format torch_dist"
        )
    for name in ("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split",
                 "account_for_loss_in_pipeline_split"):  # fmt: skip
        require(not args.get(name), f"Megatron's {name}", args.get(name), "unset in files a rank; use torch_dist")


class RankStore:
    """The tensors of rank files without copies, as a `TensorStore`."""

    def __init__(self, files: RankFiles, config: ModelConfig, layout: Layout, form: Form) -> None:
        self._files = files
        self._tensors = files.tensors()
        self._copies: dict[str, list[str]] = defaultdict(list)
        for entry in entries(config, layout, form):
            if entry.stored.name != entry.first:
                self._copies[entry.first].append(entry.stored.name)
        copies = {name for names in self._copies.values() for name in names}
        if missing := sorted(copies - self._tensors.keys()):
            raise RunError(f"{self.where(missing[0])}: {len(missing)} tensors are missing, such as {missing[0]}")
        self._names = self._tensors.keys() - copies

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        tensor = self._tensors[name]
        for copy in self._copies[name]:
            if not torch.equal(tensor, self._tensors[copy]):
                raise RunError(f"{self.where(copy)}: {copy} differs from {name}: ranks must hold the same")
        return tensor if index is None else tensor[index]

    def where(self, name: str) -> str:
        return str(self._files.folder / name.split("/", 1)[0] / RANK_FILE)


def write(
    source: Source, folder: Path, layout: Layout, form: Form, common: dict[str, Any], dtype: torch.dtype | None
) -> None:
    """Write the files of all ranks into `folder`, one after the other; memory holds one rank's weights."""
    from dmoe.checkpoint.formats.mapped import stored_outlines

    by_file: dict[str, list[Stored]] = defaultdict(list)
    for entry in entries(source.config, layout, form):
        by_file[entry.stored.name.split("/", 1)[0]].append(entry.stored)
    for name, tensors in by_file.items():
        (folder / name).mkdir(parents=True)
        model = rank_state(source, tensors, {n: o.dtype for n, o in stored_outlines(source, tensors, dtype).items()})
        torch.save({**common, "model": model}, folder / name / RANK_FILE)


def rank_state(source: Source, tensors: Mapping, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor | None]:
    """A rank's state dict, with the empty states that Megatron's linear layers have beside their weights."""
    state: dict[str, Tensor | None] = {}
    for stored in tensors:
        name = stored.name.split("/", 2)[-1]
        state[name] = assemble(source, stored, dtypes[stored.name])
        if (owner := extra_state_owner(name)) is not None:
            state[f"{owner}._extra_state"] = None
        if name == "decoder.final_layernorm.weight":  # the last stage; a tied head has no weight of its own there
            state["output_layer._extra_state"] = None
    return state


def extra_state_owner(name: str) -> str | None:
    """The linear layer that a weight belongs to, if Megatron keeps an extra state with it."""
    owner = name.rpartition(".")[0]
    last = owner.rsplit(".", 1)[-1]
    return owner if last.startswith("linear_") or last == "output_layer" else None
