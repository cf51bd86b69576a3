"""One of two gloo ranks of test_megatron.py: our layer against Megatron's own, all cases in one launch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import fast_gelu, quick_gelu, squared_relu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias, reset_model_temporary_tensors
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)
from megatron_checkpoint_cases import checkpoints
from megatron_cpu import (
    LOSSES,
    alone,
    close,
    config,
    dmoe_layer,
    gpt_model,
    gradient,
    in_our_names,
    megatron_layer,
    our_gradients,
    parallel,
    patch_megatron,
    randomize,
)
from torch import Tensor

from dmoe.errors import ConfigError
from dmoe.ops.collectives import leave_process_group

SIGMOID = {"moe_router_score_function": "sigmoid"}
CASES: dict[str, dict[str, Any]] = {
    "softmax after top-2": {},
    "no losses": {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": None},
    "softmax before top-2": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    "softmax before top-1": {"moe_router_pre_softmax": True, "moe_router_topk": 1},
    "sigmoid": {**SIGMOID, "moe_router_topk": 3, "moe_router_topk_scaling_factor": 1.5},
    "sigmoid, top-1": {**SIGMOID, "moe_router_topk": 1},
    "all experts": {"moe_router_topk": 6},
    "one expert": {"num_moe_experts": 1, "moe_router_topk": 1, "moe_router_pre_softmax": True},
    "shared expert": {"moe_shared_expert_intermediate_size": 40},
    "plain shared expert": {
        "moe_shared_expert_intermediate_size": 40, "gated_linear_unit": False, "activation_func": squared_relu,
    },
    "gated shared expert": {"moe_shared_expert_intermediate_size": 40, "moe_shared_expert_gate": True},
    "biases": {"add_bias_linear": True},
    "plain, biases": {"add_bias_linear": True, "gated_linear_unit": False, "activation_func": F.relu},
    "gelu": {"activation_func": F.gelu},
    "tanh gelu": {"activation_func": functools.partial(F.gelu, approximate="tanh")},
    "fast gelu": {"activation_func": fast_gelu},
    "gpt-oss": {"activation_func": quick_gelu, "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0},
    "groups of sigmoids": {**SIGMOID, "moe_router_num_groups": 3, "moe_router_group_topk": 2},
    "groups of logits": {"moe_router_num_groups": 3, "moe_router_group_topk": 1},
    "groups of softmax": {"moe_router_pre_softmax": True, "moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "expert bias": {**SIGMOID, "moe_router_enable_expert_bias": True},
    "loss of sequences": {"moe_router_load_balancing_type": "seq_aux_loss", **SIGMOID},
    "two losses": {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.3, 0.7]},
    "loss times tokens": {"calculate_per_token_loss": True},
    "capacity by weight": {"moe_expert_capacity_factor": 0.7},
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "router in fp64": {"moe_router_dtype": "fp64"},
}  # fmt: skip


def tracked() -> dict[str, Tensor]:
    """What Megatron would log, and a clean slate."""
    values = {name: entry["values"].clone() for name, entry in get_moe_layer_wise_logging_tracker().items()}
    clear_aux_losses_tracker()
    return {name: value for name, value in values.items() if value.any()}


def train_step(layer: Any, x: Tensor, padding: Tensor | None = None, scale: float = 0.25) -> dict[str, Tensor]:
    """Output and input gradient. The schedule sets the scale of the losses after the forward."""
    x = x.clone().requires_grad_()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([7.0]))
    y, bias = layer(x, padding_mask=padding)
    assert bias is None
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([scale]))
    (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    return {"y": y, "x.grad": x.grad}


def pair(overrides: dict[str, Any], seed: int = 3) -> tuple[Any, Any]:
    """Megatron's layer and ours with the same weights."""
    cfg = config(**LOSSES | overrides)
    theirs, ours = megatron_layer(cfg), dmoe_layer(cfg)
    randomize(theirs, seed)
    if theirs.router.expert_bias is not None:
        theirs.router.expert_bias.copy_(torch.linspace(0.2, -0.2, cfg.num_moe_experts))
    ours.moe.load_state_dict(in_our_names(theirs))
    return theirs, ours


def same_step(theirs: Any, ours: Any, x: Tensor, about: object, **options: Any) -> None:
    tracked()
    want = train_step(theirs, x, **options)
    want |= in_our_names(theirs, gradient) | {f"tracked {k}": v for k, v in tracked().items()}
    want.pop("router.e_score_correction_bias", None)
    got = train_step(ours, x, **options)
    got |= our_gradients(ours) | {f"tracked {k}": v for k, v in tracked().items()}
    close(got, want, about)


def inputs(s: int, b: int, seed: int = 0) -> Tensor:
    return torch.randn(s, b, 32, generator=torch.Generator().manual_seed(seed))


def against_megatron(rank: int) -> None:
    """Every case on one of the ranks: output, gradients of everything, logged losses."""
    for name, overrides in list(CASES.items())[rank::2]:
        theirs, ours = pair(overrides)
        same_step(theirs, ours, inputs(5, 3), name)
        theirs.eval()
        ours.eval()
        with torch.no_grad():
            close({"y": ours(inputs(1, 1))[0]}, {"y": theirs(inputs(1, 1))[0]}, (name, "eval, one token"))
        assert not tracked(), name
    skewed = inputs(6, 2) * 0.01 + inputs(1, 1)  # all tokens choose the same experts
    same_step(*pair({}), skewed, "skew")
    theirs, ours = pair({"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [1, 2]})
    for p in (theirs.router.weight, ours.moe.router.weight):
        p.requires_grad_(False)
    same_step(theirs, ours, inputs(5, 3), "frozen router")
    y, _ = ours(inputs(0, 3))
    assert y.shape == (0, 3, 32)
    y.sum().backward()


def padding(rank: int) -> None:
    mask = torch.tensor([[0, 0, 0, 0, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    kind = ["aux_loss", "seq_aux_loss"][rank]
    losses = {"moe_router_load_balancing_type": [kind], "moe_aux_loss_coeff": [0.5]}
    theirs, ours = pair(losses)
    same_step(theirs, ours, inputs(5, 3), ("padding", kind), padding=mask)
    theirs, ours = pair({**SIGMOID, "moe_router_enable_expert_bias": True})
    ours(inputs(5, 3), padding_mask=mask)
    assert ours.local_tokens_per_expert.sum() == 2 * (~mask).sum()
    for masked in (None, mask):
        # Divided by the tokens afterwards, losses times tokens are the losses.
        _, plain = pair(losses)
        _, per_token = pair({**losses, "calculate_per_token_loss": True})
        for layer in (plain, per_token):
            (layer(inputs(5, 3), padding_mask=masked)[0] * 0).sum().backward()
        num_tokens = 15 if masked is None else (~mask).sum()
        want = {"router.weight": plain.moe.router.weight.grad * num_tokens}
        close({"router.weight": per_token.moe.router.weight.grad}, want, ("per token", kind))


def initial_weights() -> None:
    """The same seed gives Megatron's weights."""
    cfg = config(moe_shared_expert_intermediate_size=40, moe_shared_expert_gate=True)
    torch.manual_seed(5)
    theirs = megatron_layer(cfg)
    torch.manual_seed(5)
    ours = dmoe_layer(cfg)
    close(dict(ours.moe.named_parameters()), in_our_names(theirs), "initial weights", tolerance=0.0)


def over_steps(rank: int) -> None:
    """What Megatron sums over the micro-batches of a step and over data-parallel ranks."""
    losses = {"moe_router_load_balancing_type": ["global_aux_loss"], "moe_aux_loss_coeff": [0.5]}
    theirs, ours = pair({**losses, **SIGMOID, "moe_router_enable_expert_bias": True})
    cfg = ours.config
    for step in range(2):
        for micro in range(2):
            about = ("over steps", step, micro)
            same_step(theirs, ours, inputs(5, 3, seed=10 * rank + 3 * step + micro), about)
        for layer in (theirs, ours):
            _update_router_expert_bias([layer], cfg)
            reset_model_temporary_tensors(cfg, [layer])
        bias = theirs.router.expert_bias
        close({"bias": ours.moe.router.e_score_correction_bias}, {"bias": bias}, ("expert bias", step))
        assert (bias - torch.linspace(0.2, -0.2, 6)).abs().max() > 5e-4, "the bias has not moved"
    assert ours.bfloat16().moe.router.e_score_correction_bias.dtype == torch.float32


def whole_model(rank: int) -> None:
    """A GPTModel: loss and gradient of every parameter, weights by a distributed name each."""
    cfg = config(**LOSSES, moe_shared_expert_intermediate_size=40)
    theirs, ours = gpt_model(cfg, ours=False), gpt_model(cfg, ours=True)
    randomize(theirs, 1)
    state = {k: v for k, v in theirs.state_dict().items() if ".mlp." not in k}
    for i, layer in enumerate(theirs.decoder.layers):
        state |= {f"decoder.layers.{i}.mlp.moe.{k}": v for k, v in in_our_names(layer.mlp).items()}
    ours.load_state_dict(state)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(rank))
    mask = torch.ones(1, 1, 16, 16).triu(1).bool()
    losses = []
    for model in (theirs, ours):
        loss = model(tokens, torch.arange(16).expand(2, 16), mask, labels=tokens.roll(-1, 1)).mean()
        loss.backward()
        losses.append(loss)
    close({"loss": losses[1]}, {"loss": losses[0]}, "whole model")
    rest = [{n: gradient(p) for n, p in m.named_parameters() if ".mlp." not in n} for m in (ours, theirs)]
    close(*rest, "whole model", tolerance=3e-5)
    for a, b in zip(theirs.decoder.layers, ours.decoder.layers):
        assert b.mlp.layer_number == a.mlp.layer_number
        close(our_gradients(b.mlp), in_our_names(a.mlp, gradient), "whole model", tolerance=3e-5)


def summed(gradients: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """Of what ranks have in full, the sum; of the experts, which have seen the tokens of all ranks, what is here."""
    for name, value in gradients.items():
        if not name.startswith("experts."):
            dist.all_reduce(value, group=group)
    return gradients


def expert_parallel(rank: int) -> None:
    """Two ranks with half of the experts each, against one rank with all of them, and against Megatron's."""
    groups = alone()
    for overrides in (
        {"moe_shared_expert_intermediate_size": 40},
        {**SIGMOID, "add_bias_linear": True},
        {"moe_expert_capacity_factor": 0.7},
    ):
        cfg = config(**LOSSES | overrides, expert_model_parallel_size=2)
        whole, ours, theirs = dmoe_layer(cfg, pg_collection=groups), dmoe_layer(cfg), megatron_layer(cfg)
        randomize(whole, 2)
        mine = slice(3 * rank, 3 * rank + 3)
        state = {k: v[mine] if k.startswith("experts.") else v for k, v in whole.moe.state_dict().items()}
        ours.moe.load_state_dict(state)
        _load(theirs, state)
        batches = [inputs(5, 3, seed=1), inputs(5, 3, seed=2)]
        steps = [train_step(whole, x) for x in batches]
        want = {k: v[mine] if k.startswith("experts.") else v for k, v in our_gradients(whole).items()}
        tracked()
        got = train_step(ours, batches[rank])
        logged = tracked()
        close(got, steps[rank], ("expert parallel", overrides))
        close(summed(our_gradients(ours), None), want, ("expert parallel", overrides))
        close(train_step(theirs, batches[rank]), got, ("Megatron, expert parallel", overrides))
        close(tracked(), logged, ("Megatron, expert parallel", overrides))
        close(summed(in_our_names(theirs, gradient), None), want, ("Megatron, expert parallel", overrides))
        _marks(ours, theirs)
    x = inputs(4, 2) if rank else inputs(0, 2)  # a rank without tokens, in eval: no losses
    ours.eval()
    whole.eval()
    close({"y": ours(x)[0]}, {"y": whole(x)[0]}, "a rank without tokens")
    limited = dmoe_layer(cfg, max_rows=4, backend="reference").eval()
    limited.moe.load_state_dict(ours.moe.state_dict())
    close({"y": limited(x)[0]}, {"y": ours(x)[0]}, "in chunks")
    assert (limited.moe.experts.config.backend, limited._dispatch.max_rows) == ("reference", 4)


def data_parallel(rank: int, ep: int) -> None:
    """Megatron's DistributedDataParallel adds up micro-batches and ranks: by the marks, and without its fused sums."""
    cfg = config(**LOSSES, expert_model_parallel_size=ep)
    theirs, ours = megatron_layer(cfg), dmoe_layer(cfg)
    randomize(theirs, 1)
    ours.moe.load_state_dict(in_our_names(theirs))
    for layer in (theirs, ours):
        model = DistributedDataParallel(cfg, DistributedDataParallelConfig(overlap_grad_reduce=False), layer)
        model.zero_grad_buffer()
        for micro in range(2):
            model(inputs(5, 3, seed=2 * rank + micro))[0].square().sum().backward()
        model.finish_grad_sync()
    got = {name: parameter.main_grad for name, parameter in ours.moe.named_parameters()}
    close(got, in_our_names(theirs, lambda p: p.main_grad), ("data parallel", ep))


@torch.no_grad()
def _load(theirs: Any, state: dict[str, Tensor]) -> None:
    """Our weights into Megatron's layer."""
    theirs.router.weight.copy_(state["router.weight"])
    if theirs.router.bias is not None:
        theirs.router.bias.copy_(state["router.bias"])
    if theirs.shared_experts is not None:
        halves = [state[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up")]
        theirs.shared_experts.linear_fc1.weight.copy_(torch.cat(halves))
        theirs.shared_experts.linear_fc2.weight.copy_(state["shared_experts.down_proj.weight"])
    for i, expert in enumerate(theirs.experts.local_experts):
        for linear, name in ((expert.linear_fc1, "gate_up"), (expert.linear_fc2, "down")):
            linear.weight.copy_(state[f"experts.{name}_proj"][i])
            if linear.bias is not None:
                linear.bias.copy_(state[f"experts.{name}_bias"][i])


def _marks(ours: Any, theirs: Any) -> None:
    """Parameters carry the attributes by which Megatron reduces gradients and takes their norm."""
    expert = theirs.experts.local_experts[0].linear_fc1.weight
    assert expert.allreduce is False
    assert expert.tensor_model_parallel is True
    for name, parameter in ours.moe.named_parameters():
        routed = name.startswith("experts.")
        assert getattr(parameter, "allreduce", True) is not routed, name
        assert getattr(parameter, "tensor_model_parallel", False) is routed, name
        assert hasattr(parameter, "sequence_parallel") is not routed, name
    assert ours.moe.router.weight.sequence_parallel == theirs.router.weight.sequence_parallel


def refusals() -> None:
    """What the groups ask for and the layer does not do."""
    groups = alone()
    groups.expt_tp = dist.group.WORLD
    with pytest.raises(ConfigError, match="expert_tensor_parallel_size is 2: must be 1"):
        dmoe_layer(config(), pg_collection=groups)
    with pytest.raises(ConfigError, match="num_moe_experts is 5: must be divisible by expert_model_parallel_size"):
        dmoe_layer(config(num_moe_experts=5))
    groups = alone()
    groups.tp = dist.group.WORLD
    layer = dmoe_layer(config(), pg_collection=groups)
    with pytest.raises(ConfigError, match="sequence_parallel is False: must be True"):
        layer(inputs(2, 2))
    layer.eval()(inputs(2, 2))


def latent() -> None:
    """Routed experts in a narrower space; Megatron's layer has it with Transformer Engine alone."""
    cfg = config(moe_latent_size=16, moe_shared_expert_intermediate_size=40, **LOSSES)
    layer, x = dmoe_layer(cfg), inputs(5, 3)
    y, _ = layer(x)
    moe, x_TD = layer.moe, x.view(-1, 32)
    routing = moe.router(x_TD)
    y_TL = moe.experts(moe.fc1_latent_proj(x_TD), routing.topk_ids_TK, routing.topk_weights_TK)
    close({"y": y.view(-1, 32)}, {"y": moe.fc2_latent_proj(y_TL) + moe.shared_experts(x_TD)}, "latent")
    y.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())
    stored = layer.sharded_state_dict(prefix="mlp.")
    assert stored["mlp.moe.fc1_latent_proj.weight"].key == "mlp.fc1_latent_proj.weight"


def half_precision() -> None:
    cfg = config(params_dtype=torch.bfloat16, moe_shared_expert_intermediate_size=40)
    layer, wide = dmoe_layer(cfg), dmoe_layer(config(moe_shared_expert_intermediate_size=40))
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    wide.moe.load_state_dict(layer.moe.state_dict())
    x = inputs(5, 3).bfloat16()
    y, _ = layer(x)
    assert y.dtype == torch.bfloat16
    close({"y": y.float()}, {"y": wide(x.float())[0]}, "bf16", tolerance=0.03)


def layouts_of_weights(rank: int) -> None:
    """Experts drawn on the CPU do not depend on the number of ranks."""
    groups = alone()
    cfg = config(expert_model_parallel_size=2, moe_shared_expert_intermediate_size=40)
    layers = []
    for options in ({"pg_collection": groups}, {}):
        torch.manual_seed(9)
        layers.append(dmoe_layer(cfg, **options))
    whole, part = (dict(layer.moe.named_parameters()) for layer in layers)
    mine = slice(3 * rank, 3 * rank + 3)
    want = {k: v[mine] if k.startswith("experts.") else v for k, v in whole.items()}
    close(part, want, "weights over ranks", tolerance=0.0)


def sequence_parallel(rank: int) -> None:
    """Tensor parallelism: ranks have a part of each sequence and share one micro-batch; experts are on one of them."""
    groups = alone()
    types = {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.5, 0.5]}
    sizes = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    cfg = config(**types, moe_z_loss_coeff=0.1, moe_shared_expert_intermediate_size=40, sequence_parallel=True, **sizes)
    whole, ours = dmoe_layer(cfg, pg_collection=groups), dmoe_layer(cfg)
    randomize(whole, 2)
    mine = slice(3 * rank, 3 * rank + 3)
    state = {k: v[mine] if k.startswith("experts.") else v for k, v in whole.moe.state_dict().items()}
    ours.moe.load_state_dict(state)
    x = inputs(8, 3)
    step = train_step(whole, x)
    want = {k: v[mine] if k.startswith("experts.") else v for k, v in our_gradients(whole).items()}
    part = slice(4 * rank, 4 * rank + 4)
    close(train_step(ours, x[part]), {k: v[part] for k, v in step.items()}, "sequence parallel")
    close(summed(our_gradients(ours), parallel_state.get_tensor_model_parallel_group()), want, "sequence parallel")
    assert ours.moe.router.weight.sequence_parallel is True


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    patch_megatron()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    parallel()
    against_megatron(rank)
    padding(rank)
    initial_weights()
    latent()
    half_precision()
    over_steps(rank)
    whole_model(rank)
    data_parallel(rank, ep=1)
    parallel(expert_model_parallel_size=2)
    data_parallel(rank, ep=2)
    expert_parallel(rank)
    refusals()
    layouts_of_weights(rank)
    parallel(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1)
    sequence_parallel(rank)
    checkpoints(folder)
    leave_process_group()
