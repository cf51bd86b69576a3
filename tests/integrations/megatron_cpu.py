"""megatron-core on a CPU: the places where it assumes a GPU, patched; configs and weights for the tests.

Import it in a process of its own: the patches stay.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dmoe.integrations.megatron import get_dmoe_module_spec, use_dmoe

SIZES = {"hidden_size": 32, "moe_ffn_hidden_size": 24, "num_moe_experts": 6, "moe_router_topk": 2}
LOSSES = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}


class _NoTracker:
    """In place of the tracker of random states on the GPU."""

    @contextlib.contextmanager
    def fork(self, *args: Any) -> Iterator[None]:
        yield

    def get_states(self) -> dict[str, Tensor]:
        return {}


def patch_megatron() -> None:
    tracker = _NoTracker()
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args: None
    moe_utils.te_general_gemm = None  # a name that is missing where Transformer Engine is
    tensor_parallel.random._get_all_rng_states = lambda: ()
    tensor_parallel.random._set_all_rng_states = lambda *args: None
    tensor_parallel.random._fork_rng = contextlib.nullcontext
    for module in (tensor_parallel, tensor_parallel.random, tensor_parallel.layers):
        module.get_cuda_rng_tracker = lambda: tracker
    filesystem_async._results_queue = queue.Queue()  # else that of an interpreter started for it
    # Experts with biases add to a view that autograd does not let them change.
    reduce = tensor_parallel.layers.reduce_from_tensor_model_parallel_region
    tensor_parallel.layers.reduce_from_tensor_model_parallel_region = lambda *args, **kw: reduce(*args, **kw).clone()


def config(**overrides: Any) -> TransformerConfig:
    fields: dict[str, Any] = {
        "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 64, "init_method_std": 0.3,
        "use_cpu_initialization": True, "add_bias_linear": False, "gated_linear_unit": True, "activation_func": F.silu,
        "bias_activation_fusion": False, "bias_dropout_fusion": False, "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False, "moe_token_dispatcher_type": "allgather", "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "normalization": "RMSNorm", **SIZES,
    }  # fmt: skip
    return TransformerConfig(**fields | overrides)


def megatron_layer(cfg: TransformerConfig, **options: Any) -> Any:
    layer = build_module(get_moe_module_spec(use_te=False, num_experts=cfg.num_moe_experts), config=cfg, **options)
    layer.set_layer_number(1)
    return layer


def dmoe_layer(cfg: TransformerConfig, **options: Any) -> Any:
    layer = build_module(get_dmoe_module_spec(**options), config=cfg)
    layer.set_layer_number(1)
    return layer


def gpt_model(cfg: TransformerConfig, ours: bool) -> Any:
    spec = get_gpt_layer_local_spec(num_experts=cfg.num_moe_experts, normalization="RMSNorm")
    return GPTModel(cfg, use_dmoe(spec) if ours else spec, 64, 16, position_embedding_type="learned_absolute")


def alone() -> ProcessGroupCollection:
    """Groups of this rank alone. Every rank must call it."""
    groups = ProcessGroupCollection()
    rank = dist.get_rank()
    mine = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    for name in ("ep", "tp", "cp", "expt_tp", "expt_dp", "tp_ep", "tp_cp", "tp_dp_cp"):
        setattr(groups, name, mine)
    return groups


def parallel(**sizes: int) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Weights that are large enough for the choice of experts to be clear, and equal on all ranks for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)


def in_our_names(layer: Any, of: Callable[[Tensor], Any] = lambda p: p.detach()) -> dict[str, Any]:
    """Tensors of a Megatron MoELayer, or what `of` makes of them, under the names and in the shapes of `MoE`."""
    result = {"router.weight": of(layer.router.weight)}
    if layer.router.bias is not None:
        result["router.bias"] = of(layer.router.bias)
    if layer.router.expert_bias is not None:
        result["router.e_score_correction_bias"] = of(layer.router.expert_bias)
    experts, gated = layer.experts.local_experts, layer.config.gated_linear_unit
    up = "gate_up" if gated else "up"
    for linear, ours in (("linear_fc1", up), ("linear_fc2", "down")):
        result[f"experts.{ours}_proj"] = torch.stack([of(getattr(e, linear).weight) for e in experts])
        if layer.config.add_bias_linear:
            result[f"experts.{ours}_bias"] = torch.stack([of(getattr(e, linear).bias) for e in experts])
    shared = layer.shared_experts
    if shared is not None:
        halves = of(shared.linear_fc1.weight).chunk(2 if gated else 1)
        names = ("gate_proj", "up_proj") if gated else ("up_proj",)
        result |= {f"shared_experts.{name}.weight": half for name, half in zip(names, halves)}
        result["shared_experts.down_proj.weight"] = of(shared.linear_fc2.weight)
        if shared.gate_weight is not None:
            result["shared_expert_gate.weight"] = of(shared.gate_weight)
    return result


def gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def our_gradients(layer: Any) -> dict[str, Tensor]:
    return {name: gradient(parameter) for name, parameter in layer.moe.named_parameters()}


def close(got: dict[str, Any], want: dict[str, Any], about: object, tolerance: float = 1e-5) -> None:
    """Equal keys, and values equal up to `tolerance` times the largest element of each."""
    assert got.keys() == want.keys(), (got.keys() ^ want.keys(), about)
    for name, wanted in want.items():
        assert got[name].shape == wanted.shape, (name, got[name].shape, wanted.shape, about)
        scale = wanted.detach().abs().max().clamp_min(1e-3).item() if wanted.numel() else 1.0
        difference = (got[name] - wanted).detach().abs().max().item() / scale if wanted.numel() else 0.0
        assert difference <= tolerance, (name, difference, about)
