"""One of two gloo ranks of test_transformers_parallel.py: expert parallelism through transformers, in one launch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers_experts_cases as cases
import transformers_models as models
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dmoe.integrations.transformers import EP_NAME, calls, check, register
from dmoe.ops.collectives import leave_process_group


def batch_of(rank: int) -> dict[str, Tensor]:
    ids = torch.randint(3, models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(7 + rank))
    mask = torch.ones_like(ids)
    mask[0, : 3 * rank] = 0
    return {"input_ids": ids, "attention_mask": mask}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_models(path: str, rank: int, implementation: str, ep: str = EP_NAME, shares_batch: bool = False) -> None:
    """Against one process: logits, and gradients, as the mean over ranks where each has its own batch. Ranks that share
    one divide attention too."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.integrations import accelerate

    config = DistributedConfig(
        tp_size=2 if shares_batch else None, fsdp_size=None if shares_batch else 2, ep_size=2, ep_implementation=ep
    )
    # Loading over ranks asks for accelerate to be installed, and does not use it.
    with mock.patch.object(accelerate, "is_accelerate_available", return_value=True):
        model = AutoModelForCausalLM.from_pretrained(
            path, distributed_config=config, experts_implementation=implementation, attn_implementation="eager"
        ).train()
    alone = AutoModelForCausalLM.from_pretrained(
        path, experts_implementation="eager", attn_implementation="eager"
    ).train()
    parallel = [m for m in model.modules() if getattr(m, "_is_expert_parallel", False)]
    assert parallel
    assert all(m.gate_up_proj.shape[0] * 2 == 6 or isinstance(m.gate_up_proj, DTensor) for m in parallel)
    if implementation == "dmoe":
        check(model)
    batches = [0] if shares_batch else [0, 1]
    logits, gradients = models.run(model, batch_of(0 if shares_batch else rank))
    assert set(calls(model).values()) == ({1} if implementation == "dmoe" else {0})
    wanted: dict[str, Tensor] = {}
    for r in batches:
        want, of_rank = models.run(alone, batch_of(r))
        if r == rank or shares_batch:
            assert models.error(logits, want) <= 5e-6
        for name, gradient in of_rank.items():
            wanted[name] = wanted.get(name, 0) + gradient / len(batches)
    assert gradients.keys() == wanted.keys()
    for name in sorted(wanted):
        assert models.error(full(gradients[name]), wanted[name]) <= 1e-5, (implementation, ep, name)
    assert any("q_proj" in name for name in wanted)
    assert any("experts" in name for name in wanted)


class Parts(nn.Module):
    """The experts of one rank: a part of a whole module, as transformers makes it."""

    def __init__(self, whole: Any, rank: int) -> None:
        super().__init__()
        self.whole, self.config, self.num_experts = whole, whole.config, whole.num_experts // 2
        self.rank = rank

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        assert x.shape[0] > 0 or self.config._experts_implementation == "dmoe"
        return self.whole(x, ids + self.rank * self.num_experts, weights)


def single_layers(rank: int, shares_batch: bool, used: range, tokens: tuple[int, int], implementation: str) -> None:
    """With one layer: ranks without tokens or rows, and ranks that hold the same tokens."""
    from transformers.distributed.expert_parallel import EPImplementationInterface

    torch.manual_seed(3)
    case = cases.Case(num_experts=6, has_bias=True)
    whole, oracle = cases.build(case), cases.build(case).double()
    oracle.load_state_dict(whole.state_dict())
    if implementation == "loop":
        type(whole).forward = lambda self, *args: cases.expected(self, case, *args)
        whole.config = SimpleNamespace(_experts_implementation="loop")
    batches = []
    for r in range(2):
        n = tokens[0] if shares_batch else tokens[r]
        ids, weights = cases.routing(n, 2, len(used))
        batches.append((torch.randn(n, cases.D), ids + used.start, weights))
    if shares_batch:
        batches[1] = batches[0]
    x, ids, weights = (t.clone() for t in batches[rank])
    x.requires_grad_()
    weights.requires_grad_()
    mesh, single = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
    dispatch = EPImplementationInterface()[EP_NAME](Parts(whole, rank), mesh, mesh if shares_batch else single)
    y = dispatch(x, ids, weights)
    y.backward(torch.linspace(1, 2, y.numel()).view(y.shape))
    assert whole.down_proj.grad is not None, "an unused expert must take part in the backward"
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)  # each rank computed its experts alone
    for r in [0] if shares_batch else [0, 1]:
        of_x, of_ids, of_weights = batches[r]
        leaves = of_x.double().requires_grad_(), of_weights.double().requires_grad_()
        want = cases.expected(oracle, case, leaves[0], of_ids, leaves[1])
        if want.numel():
            want.backward(torch.linspace(1, 2, want.numel()).double().view(want.shape))
        if r == rank or shares_batch:
            assert y.shape == want.shape
            if want.numel():
                assert models.error(y, want) <= 2e-6
                assert models.error(x.grad, leaves[0].grad) <= 2e-6
                assert models.error(weights.grad, leaves[1].grad) <= 2e-6
    for gradient, parameter in zip(gradients, oracle.parameters(), strict=True):
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert models.error(gradient, want) <= 2e-6


def rank_main(rank: int, world: int, path: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{path}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    register()
    for kind in ("mixtral", "qwen3_moe"):
        whole_models(f"{path}/{kind}", rank, "dmoe")
    whole_models(f"{path}/mixtral", rank, "grouped_mm")
    whole_models(f"{path}/qwen3_moe", rank, "dmoe", shares_batch=True)
    whole_models(f"{path}/qwen3_moe", rank, "dmoe", "all_reduce", shares_batch=True)
    everyone, second_half = range(6), range(3, 6)
    for implementation in ("dmoe", "loop"):
        single_layers(rank, False, everyone, (7, 4), implementation)
        single_layers(rank, False, second_half, (7, 0), implementation)
        single_layers(rank, True, everyone, (7, 7), implementation)
        single_layers(rank, True, second_half, (1, 1), implementation)
    dist.barrier()
    leave_process_group()
