"""Mixture-of-experts layers of the Megatron fork that trains with MegaBlocks, one at a time, in and out.

The fork's GPT as a whole (learned positions, LayerNorm, biases everywhere) is no model of our `Decoder`. Its layers are
`MoE` layers but for one output bias [D], the same for all experts, which is kept apart: add it to the layer's output.

A rank's file has them under `language_model.encoder.layers.N.mlp.moe.`. With expert parallelism they are spread over
the ranks of data parallelism: n = min(ranks, E) parts of E / n experts, rank r having part r mod n; with more ranks
than experts each has only part r // n of the rows of its expert. Tensor parallelism does not split them.

Folders: `mp_rank_TT[_DDD][_PPP]`, DDD (data parallelism) only with expert parallelism.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.formats.megatron import torch_files
from dmoe.checkpoint.formats.megatron.folders import RANK_FILE, iteration_folder
from dmoe.config import MoEConfig, require
from dmoe.errors import ConfigError, RunError

_FILES = (RANK_FILE, "model_rng.pt")
_LAYER = re.compile(r"layers\.(\d+)\.mlp\.moe\.(.+)")
ROUTER, BIAS, EXPERTS = "router.layer.weight", "experts.bias", "experts.mlp."


def refuse_whole_model(folder: Path, state: Mapping[str, Any]) -> None:
    """Raise ConfigError for the state of a rank of the fork, or of an equally old Megatron."""
    if "language_model" in state:
        raise ConfigError(
            f"{folder}: the model is Megatron's older GPT, with learned positions, LayerNorm and biases: must be one "
            "of Megatron-core's; dmoe.checkpoint.formats.megatron.fork.ForkLayers reads its mixture-of-experts layers"
        )


class ForkLayers:
    """The mixture-of-experts layers of a checkpoint of the fork.

    Attributes:
        config: of every layer; the fork's default activation, and its losses with their weights by layer.
        layers: their numbers in the model.

    Raises:
        ConfigError: no arguments in the files, or a kind of layer that ours is not.
        RunError: files that are missing or damaged.
    """

    def __init__(self, path: Path | str, *, iteration: int | None = None) -> None:
        self.folder = iteration_folder(Path(path), iteration)
        self._states: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.config: MoEConfig
        args: dict[str, Any] = {}
        for folder in sorted(self.folder.glob("mp_rank_00*")):
            file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
            if file is None:
                raise RunError(f"{folder}: has none of {', '.join(_FILES)}")
            state = torch_files.load(file)
            if not args:
                args = _args(state, file)
            self._states[_ranks(folder.name, args)] = _encoder(state, file)
        if not args:
            raise RunError(f"{self.folder}: has no mp_rank_00*")
        self.config = _config(args)
        self._pp = args.get("pipeline_model_parallel_size") or 1
        self._dp = 1 + max(data_rank for data_rank, _ in self._states)
        wanted = {(d, p) for d in range(self._dp) for p in range(self._pp)}
        if missing := wanted - self._states.keys():
            names = ", ".join(f"data rank {d}, stage {p}" for d, p in sorted(missing)[:10])
            raise RunError(f"{self.folder}: files are missing: {names}")
        self._per_stage = args["num_layers"] // self._pp
        found = {(p, int(m[1])) for (_, p), s in self._states.items() for m in map(_LAYER.match, s) if m}
        self.layers = sorted(p * self._per_stage + n for p, n in found)

    def read(self, layer: int) -> dict[str, Tensor]:
        """The state dict of our `MoE` with weights of layer `layer`."""
        config = self.config
        E, F, D = config.num_experts, config.intermediate_size, config.hidden_size
        router = self._tensor(layer, 0, ROUTER)
        up = torch.empty(E, 2 * F if config.gated else F, D, dtype=router.dtype)
        down = torch.empty(E, D, F, dtype=router.dtype)
        names = ("w1", "v1") if config.gated else ("w1",)
        for rank in range(self._dp):
            experts, rows = shard(config, rank, self._dp)
            for half, name in enumerate(names):
                part = self._part(layer, rank, name, len(experts), len(rows))
                up[experts.start : experts.stop, half * F + rows.start : half * F + rows.stop] = part
            part = self._part(layer, rank, "w2", len(experts), len(rows))
            down[experts.start : experts.stop, :, rows.start : rows.stop] = part.transpose(1, 2)
        name = "gate_up_proj" if config.gated else "up_proj"
        return {"router.weight": router.clone(), f"experts.{name}": up, "experts.down_proj": down}

    def output_bias(self, layer: int) -> Tensor | None:
        """[D], to be added to the layer's output; None if it has none."""
        stage, local = divmod(layer, self._per_stage)
        return self._states[0, stage].get(f"layers.{local}.mlp.moe.{BIAS}")

    def _part(self, layer: int, rank: int, name: str, num_experts: int, num_rows: int) -> Tensor:
        """[experts, rows, D] of a rank, whichever class stored it."""
        tensor, D = self._tensor(layer, rank, EXPERTS + name), self.config.hidden_size
        dropping = self.config.capacity_factor > 0
        shape = (num_experts * num_rows, D)
        if dropping:
            shape = (num_experts, D, num_rows) if name == "w1" else (num_experts, num_rows, D)  # type: ignore[assignment]
        if tuple(tensor.shape) != shape:
            raise RunError(f"{self.folder}: {name} of layer {layer}, data rank {rank}, has shape {list(tensor.shape)}: "
                           f"must be {list(shape)}")  # fmt: skip
        if dropping:
            return tensor.transpose(1, 2) if name == "w1" else tensor
        return tensor.view(num_experts, num_rows, D)

    def _tensor(self, layer: int, rank: int, name: str) -> Tensor:
        stage, local = divmod(layer, self._per_stage)
        full = f"layers.{local}.mlp.moe.{name}"
        tensor = self._states[rank, stage].get(full)
        if tensor is None:
            raise RunError(f"{self.folder}: data rank {rank}, stage {stage}: {full} is missing")
        return tensor


def shard(config: MoEConfig, rank: int, world: int) -> tuple[range, range]:
    """Experts, and rows of each, of a rank of data parallelism. Raises ConfigError where they cannot be shared out."""
    E, F = config.num_experts, config.intermediate_size
    degree = min(world, E)
    require(E % degree == 0, "data parallel ranks", world, f"a divisor of the number of experts ({E}), or a multiple")
    require(world % degree == 0, "data parallel ranks", world, f"a multiple of the number of experts ({E})")
    parts = world // degree
    require(F % parts == 0, "moe.intermediate_size", F, f"divisible by {parts} ranks an expert")
    e, f = E // degree, F // parts
    return range(rank % degree * e, (rank % degree + 1) * e), range(rank // degree * f, (rank // degree + 1) * f)


def rank_state(
    state: Mapping[str, Tensor], config: MoEConfig, rank: int = 0, world: int = 1, output_bias: Tensor | None = None
) -> dict[str, Tensor]:
    """The reverse of `ForkLayers.read`: what a rank stores under `mlp.moe.` for a layer of ours.

    Args:
        state: state dict of the `MoE`.
        config: of the layer; with a `capacity_factor` the fork uses MegaBlocks' MoE, else dMoE.
        rank, world: of data parallelism, over which experts are spread; without expert parallelism 0 and 1.
        output_bias: [D]; None: zeros, which is the same as none.

    Raises:
        ConfigError: a layer that the fork does not compute; names the field.
    """
    needed = {"norm_topk_prob": False, "shared_intermediate_size": 0, "activation": "gelu_tanh", "bias": False,
              "router_bias": False, "score_function": "softmax", "routing": "topk", "n_group": 1, "latent_size": 0,
              "routed_scaling_factor": 1.0, "expert_bias_rate": 0.0, "weigh_input": False}  # fmt: skip
    for name, right in needed.items():
        value = getattr(config, name)
        require(
            value == right or config.top_k == config.num_experts == 1, f"moe.{name}", value, f"{right!r} in the fork"
        )
    dropping = config.capacity_factor > 0
    require(not (dropping and config.gated), "moe.gated", True, "False with moe.capacity_factor in the fork")
    experts, rows = shard(config, rank, world)
    F, D = config.intermediate_size, config.hidden_size
    up = state["experts.gate_up_proj" if config.gated else "experts.up_proj"][experts.start : experts.stop]
    down = state["experts.down_proj"][experts.start : experts.stop, :, rows.start : rows.stop].transpose(1, 2)
    halves = {"w1": up[:, rows.start : rows.stop]}
    if config.gated:
        halves["v1"] = up[:, F + rows.start : F + rows.stop]
    result = {ROUTER: state["router.weight"]}
    for name, part in (halves | {"w2": down}).items():
        stored = part.reshape(-1, D) if not dropping else part.transpose(1, 2) if name == "w1" else part
        result[EXPERTS + name] = stored.contiguous()
    bias = torch.zeros(D, dtype=result[ROUTER].dtype) if output_bias is None else output_bias
    return result | {BIAS: bias}


def _args(state: Any, file: Path) -> dict[str, Any]:
    args = state.get("args") if isinstance(state, dict) else None
    if args is None or isinstance(args, torch_files.Opaque):
        raise ConfigError(f"{file}: carries no arguments of its run: must have them (args)")
    return torch_files.plain(args)


def _encoder(state: Any, file: Path) -> dict[str, Tensor]:
    try:
        encoder = state["model"]["language_model"]["encoder"]
    except (KeyError, TypeError):
        raise RunError(f"{file}: has no model.language_model.encoder") from None
    return {name: value for name, value in encoder.items() if isinstance(value, Tensor)}


def _ranks(folder: str, args: Mapping[str, Any]) -> tuple[int, int]:
    """(rank of data parallelism, of pipeline parallelism)."""
    numbers = [int(number) for number in folder.removeprefix("mp_rank_").split("_")[1:]]
    data = bool(args.get("moe_expert_model_parallelism"))
    stages = (args.get("pipeline_model_parallel_size") or 1) > 1
    if len(numbers) != data + stages:
        wanted = "mp_rank_00" + "_DDD" * data + "_PPP" * stages
        raise RunError(f"folder {folder}: must be named {wanted} by the arguments of the run")
    return numbers[0] if data else 0, numbers[-1] if stages else 0


def _config(args: Mapping[str, Any]) -> MoEConfig:
    switch = args.get("moe_use_megatron_switch")
    require(not switch, "Megatron's moe_use_megatron_switch", switch, "False: its layers are not MegaBlocks'")
    for name in ("hidden_size", "moe_num_experts", "num_layers"):
        require(bool(args.get(name)), f"Megatron's {name}", args.get(name), "in the checkpoint's arguments")
    capacity = float(args.get("moe_capacity_factor") or 0)
    return MoEConfig(
        hidden_size=args["hidden_size"],
        intermediate_size=args.get("ffn_hidden_size") or 4 * args["hidden_size"],
        num_experts=args["moe_num_experts"],
        top_k=args.get("moe_top_k") or 1,
        activation="gelu_tanh",
        gated=bool(args.get("glu")) and not capacity,
        norm_topk_prob=False,
        capacity_factor=capacity,
        drop_policy="position",
        jitter_eps=args.get("moe_jitter_eps") or 0.0,
        aux_loss_coef=(args.get("moe_loss_weight") or 0.0)
        / args["num_layers"],  # weighs the mean of the layers' losses
        z_loss_coef=0.0,
    )
