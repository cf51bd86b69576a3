"""Distributed checkpoints: what one of the two layers saved, the other loads, at another expert parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, optim_state_to_sharding_state
from megatron_cpu import close, config, gpt_model, in_our_names, parallel, randomize

EXPERT_BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
KINDS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    # name: (whether our layer saves and Megatron's loads, or the reverse; the config; the metadata)
    "to ours": (False, {"moe_shared_expert_intermediate_size": 40, "moe_shared_expert_gate": True}, {}),
    "from ours": (True, {"moe_shared_expert_intermediate_size": 40, "moe_layer_freq": [1, 1]}, {}),
    "plain": (True, {"add_bias_linear": True, "gated_linear_unit": False, **EXPERT_BIAS}, {}),
    "singly": (True, {"moe_shared_expert_intermediate_size": 40}, {"singleton_local_shards": True}),
}


class Trained:
    """A model, its optimiser, and both as Megatron stores them. The first moment of a weight is a multiple of it."""

    def __init__(self, name: str, saves: bool) -> None:
        ours_saves, overrides, metadata = KINDS[name]
        self.model = gpt_model(config(**overrides), ours=ours_saves == saves)
        ep_rank = 0 if self.model.config.expert_model_parallel_size == 1 else dist.get_rank()
        randomize(self.model, 4 + ep_rank + 10 * saves)
        for module in self.model.modules():
            if getattr(module, "expert_bias", None) is not None:
                module.expert_bias.copy_(torch.linspace(-1, 1, 6) * saves)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0)
        for parameter in self.model.parameters():
            parameter.grad = 20 * parameter.detach()
        self.optimizer.step()
        weights = self.model.sharded_state_dict(prefix=f"{name}.", metadata=dict(metadata))
        ids = get_param_id_to_sharded_param_map(weights, self.model.parameters())
        moments = {"state": self.optimizer.state_dict()["state"], "param_groups": []}
        optim_state_to_sharding_state(moments, ids, exclude_keys=("step",))
        self.sharded = {"weights": weights, "moments": moments}

    def load(self, name: str, loaded: dict[str, Any]) -> None:
        weights = {key.removeprefix(f"{name}."): value for key, value in loaded["weights"].items()}
        self.model.load_state_dict(weights)
        old = self.optimizer.state_dict()
        for number, state in loaded["moments"]["state"].items():
            old["state"][number] |= state
        self.optimizer.load_state_dict(old)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and first moments of this rank under our names."""
        state = self.optimizer.state
        weights = _in_our_names(self.model, lambda p: p.detach())
        moments = _in_our_names(self.model, lambda p: state[p]["exp_avg"] if p in state else torch.zeros(()))
        return weights | {f"{key} exp_avg": value for key, value in moments.items()}


def _in_our_names(model: Any, of: Any) -> dict[str, torch.Tensor]:
    result = {name: of(p) for name, p in model.named_parameters() if ".mlp." not in name}
    for i, layer in enumerate(model.decoder.layers):
        ours = hasattr(layer.mlp, "moe")
        stored = layer.mlp.moe.state_dict(keep_vars=True) if ours else {}
        tensors = {name: of(tensor) for name, tensor in stored.items()} if ours else in_our_names(layer.mlp, of)
        result |= {f"{i}.{name}": tensor.clone() for name, tensor in tensors.items()}
    return result


def copied(folder: Path, saved_ep: int, loaded_ep: int) -> None:
    parallel(expert_model_parallel_size=saved_ep)
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    sources = {name: Trained(name, saves=True) for name in KINDS}
    dist_checkpointing.save({name: source.sharded for name, source in sources.items()}, str(folder))
    parallel(expert_model_parallel_size=loaded_ep)
    targets = {name: Trained(name, saves=False) for name in KINDS}
    loaded = dist_checkpointing.load({name: target.sharded for name, target in targets.items()}, str(folder))
    for name, source in sources.items():
        targets[name].load(name, loaded[name])
        whole = gathered(source.tensors(), saved_ep)
        want = whole if loaded_ep == 1 else {k: part(k, v) for k, v in whole.items()}
        close(targets[name].tensors(), want, (name, saved_ep, loaded_ep), tolerance=0.0)


def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(2)[dist.get_rank()] if ".experts." in name else tensor


def gathered(tensors: dict[str, torch.Tensor], ep: int) -> dict[str, torch.Tensor]:
    if ep == 1:
        return tensors
    both: list[Any] = [None, None]
    dist.all_gather_object(both, tensors)
    return {k: torch.cat([b[k] for b in both]) if ".experts." in k else both[0][k] for k in tensors}


def checkpoints(folder: str) -> None:
    copied(Path(folder) / "a", saved_ep=2, loaded_ep=1)
    copied(Path(folder) / "b", saved_ep=1, loaded_ep=2)
