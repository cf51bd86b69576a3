"""`DMoELayer`: `MoE` with the constructor, the forward and the marks on parameters that Megatron-core expects.

Imports megatron-core; `dmoe.integrations.megatron` imports this module on use.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor

from dmoe.config import MoEConfig, require
from dmoe.integrations.megatron_checkpoint import sharded_state_dict
from dmoe.integrations.megatron_config import moe_config
from dmoe.integrations.megatron_losses import RouterLosses, Tokens
from dmoe.moe import Experts, MoE, Routing
from dmoe.moe.dispatch import AllToAllDispatcher, Dispatcher, dispatch_local


class DMoELayer(MegatronModule):
    """The mixture-of-experts layer of a Megatron-core model; `moe` is the `MoE`, with this rank's experts.

    Tokens travel to their experts over Megatron's expert group. The routed experts are whole on their rank
    (expert_tensor_parallel_size 1), and every rank has the whole shared expert, which it applies to tokens of its own.

    Args:
        config: a `TransformerConfig`; what is taken over is in `dmoe.integrations.megatron_config`.
        submodules: not used; `MoELayer` has it.
        layer_number: of the model, from 1, for the log; or `set_layer_number`.
        pg_collection: process groups. None: Megatron's global ones.
        backend, precision: as in `MoEConfig`.
        exchange, max_rows: `payload` and `max_rows` of `AllToAllDispatcher`.

    Raises:
        ConfigError: the config or the groups ask for what the layer does not do; names the field and its value.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        *,
        backend: Any = None,
        precision: Any = "same",
        exchange: str = "same",
        max_rows: int = 0,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.groups = get_default_pg_collection() if pg_collection is None else pg_collection
        self.tp_group, self.ep_group = self.groups.tp, self.groups.ep
        expert_tp = self.groups.expt_tp.size()
        require(expert_tp == 1, "TransformerConfig.expert_tensor_parallel_size", expert_tp, "1")
        full = replace(moe_config(config), backend=backend, precision=precision)
        ep_size, ep_rank = self.ep_group.size(), self.ep_group.rank()
        wanted = f"divisible by expert_model_parallel_size ({ep_size})"
        require(full.num_experts % ep_size == 0, "TransformerConfig.num_moe_experts", full.num_experts, wanted)
        self.num_local_experts = full.num_experts // ep_size
        self.local_expert_indices = [ep_rank * self.num_local_experts + i for i in range(self.num_local_experts)]
        device = torch.device("cpu" if config.use_cpu_initialization else "cuda")
        # The bias of the choice is there whatever its rate, which only Megatron reads.
        inner = replace(full, expert_bias_rate=1.0) if config.moe_router_enable_expert_bias else full
        self.moe = _build_moe(inner, self.num_local_experts, device, config.params_dtype)
        self.losses = RouterLosses(full, config, self.groups, device)
        self._dispatch: Dispatcher = dispatch_local
        if ep_size > 1:
            self._dispatch = AllToAllDispatcher(self.ep_group, full.num_experts, payload=exchange, max_rows=max_rows)
        self.moe.dispatcher = self._dispatch_with_losses
        self._tokens = Tokens(1)
        if config.moe_router_enable_expert_bias:  # Megatron finds it by this name, and moves the bias after each step
            counts_E = torch.zeros(full.num_experts, dtype=torch.int64, device=device)
            self.register_buffer("local_tokens_per_expert", counts_E, persistent=False)
        if config.perform_initialization:
            self.reset_parameters()
        self._mark_parameters()

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Apply the layer.

        Args:
            hidden_states: [s, b, h]; with sequence parallelism this rank's part of the sequence.
            intermediate_tensors: Megatron's, for CUDA graphs; must be None.
            padding_mask: bool [b, s], True for padding, which takes no part in the losses and in the loads that
                balancing looks at. It is routed as any other token.

        Returns:
            The output [s, b, h], and None, the bias that is still to be added.
        """
        require(intermediate_tensors is None, "intermediate_tensors", intermediate_tensors, "None")
        if self.training and self.tp_group.size() > 1:
            on = self.config.sequence_parallel
            require(on, "TransformerConfig.sequence_parallel", on, "True to train with tensor parallelism")
        valid_T = None if padding_mask is None else ~padding_mask.t().reshape(-1).bool()
        tokens = Tokens(hidden_states.shape[1], valid_T)

        def run(hidden_states: Tensor) -> Tensor:
            self._tokens = tokens
            return self.moe(hidden_states.reshape(-1, hidden_states.shape[-1])).view(hidden_states.shape)

        config = self.config
        if self.training and config.recompute_granularity == "selective" and "moe" in config.recompute_modules:
            return tensor_parallel.checkpoint(run, False, hidden_states), None
        return run(hidden_states), None

    def _dispatch_with_losses(self, x_TD: Tensor, routing: Routing, experts: Any, shared: Any) -> Tensor:
        tokens = self._tokens
        if torch.is_grad_enabled() and self.config.moe_router_enable_expert_bias:
            self._count(routing, tokens)
        if not (self.training and torch.is_grad_enabled()):
            return self._dispatch(x_TD, routing, experts, shared)
        counts = self.losses.start(routing, tokens)
        y_TD = self._dispatch(x_TD, routing, experts, shared)
        return self.losses.attach(y_TD, routing, tokens, counts, self.layer_number)

    @torch.no_grad()
    def _count(self, routing: Routing, tokens: Tokens) -> None:
        # Where experts are padded to their capacity, the ids are those of slots.
        ids_TK = routing.ids_before_drop if routing.even else routing.topk_ids_TK
        num_experts = routing.scores_TE.shape[1]
        chosen_TE = ids_TK.new_zeros(len(ids_TK), num_experts + 1).scatter_(1, ids_TK, 1)  # E: dropped
        if tokens.valid_T is not None:
            chosen_TE = chosen_TE * tokens.valid_T.unsqueeze(1)
        self.local_tokens_per_expert += chosen_TE.sum(0)[:num_experts]

    @property
    def expert_bias(self) -> Tensor:
        """[E] fp32, the bias of the choice. Megatron looks for modules that have one and updates it in place."""
        if not self.config.moe_router_enable_expert_bias:
            raise AttributeError("expert_bias")
        bias_E = self.moe.router.e_score_correction_bias
        assert bias_E is not None
        return bias_E

    def set_layer_number(self, layer_number: int) -> None:
        """The layer's number in the model, from 1; Megatron calls it."""
        self.layer_number = layer_number

    def backward_dw(self, routed_experts: bool = True, shared_experts: bool = False) -> None:
        """Nothing is left to do: weight gradients are computed in the backward."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as Megatron does: by `init_method`, those that write to the residual stream by
        `output_layer_init_method`, biases 0.

        On a GPU the experts are drawn there, from the generator of the expert-parallel rank. On the CPU each rank draws
        all E in the order of a `SequentialMLP` and keeps its own, so that they do not depend on the number of ranks.
        """
        config, experts = self.config, self.moe.experts
        for parameter in self.moe.router.parameters():
            _draw(config.init_method, [parameter], on_cpu=True)
        up = getattr(experts, "gate_up_proj" if experts.config.gated else "up_proj")
        if up.is_cuda:
            tracker = tensor_parallel.get_cuda_rng_tracker()
            stream = tracker.fork(tensor_parallel.get_expert_parallel_rng_tracker_name())
        else:
            stream = nullcontext()
        with stream:
            for number in self.local_expert_indices if up.is_cuda else range(self.moe.config.num_experts):
                local = number - self.local_expert_indices[0]
                mine = 0 <= local < self.num_local_experts
                _draw(config.init_method, [up[local if mine else 0]], keep=mine)
                _draw(config.output_layer_init_method, [experts.down_proj[local if mine else 0]], keep=mine)
        for name, parameter in experts.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        self._reset_replicated()

    def _reset_replicated(self) -> None:
        """What every rank has in full, but for the router, is drawn on the CPU, whose generators agree."""
        init, output_init, moe = self.config.init_method, self.config.output_layer_init_method, self.moe
        shared = moe.shared_experts
        if shared is not None:
            gate = [] if shared.gate_proj is None else [shared.gate_proj.weight]
            _draw(init, [*gate, shared.up_proj.weight], on_cpu=True)
            _draw(output_init, [shared.down_proj.weight], on_cpu=True)
        for linear, method in (
            (moe.shared_expert_gate, init), (moe.fc1_latent_proj, init), (moe.fc2_latent_proj, output_init),
        ):  # fmt: skip
            if linear is not None:
                _draw(method, [linear.weight], on_cpu=True)

    def _mark_parameters(self) -> None:
        """The attributes by which Megatron reduces gradients and takes their norm."""
        parameter: Any
        for name, parameter in self.moe.experts.named_parameters():
            # Reduced over the ranks that have the same experts, and part of the norm on every rank.
            parameter.allreduce = False
            dim = 2 if name == "down_proj" else 1
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        for name, parameter in self.moe.named_parameters():
            if not name.startswith("experts."):
                # Applied to other tokens on each rank of the tensor-parallel group: summed over it.
                parameter.sequence_parallel = self.config.sequence_parallel

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """For Megatron's distributed checkpoints; see `dmoe.integrations.megatron_checkpoint`."""
        return sharded_state_dict(self, prefix, sharded_offsets, metadata)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A distributed checkpoint brings the empty objects that `sharded_state_dict` asked for.
        for key in [k for k in state_dict if k.startswith(prefix) and k.endswith("._extra_state")]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _build_moe(full: MoEConfig, num_local_experts: int, device: torch.device, dtype: torch.dtype) -> MoE:
    """The layer with `num_local_experts` of the experts and without losses, which are Megatron's; not initialised."""
    config = replace(full, aux_loss_coef=0.0, seq_aux_loss_coef=0.0, global_aux_loss_coef=0.0, z_loss_coef=0.0)
    moe = MoE(config, device="meta", dtype=dtype)
    local = replace(
        config, num_experts=num_local_experts, top_k=min(config.top_k, num_local_experts), n_group=1, topk_group=1,
        group_score_top=0,
    )  # fmt: skip
    moe.experts = Experts(local, device="meta", dtype=dtype)
    moe.to_empty(device=device)
    for buffer in moe.buffers():
        buffer.zero_()
    return moe


def _draw(init_method: Any, parts: list[Tensor], *, keep: bool = True, on_cpu: bool = False) -> None:
    """Fill `parts`, side by side one matrix, by `init_method`; drawn and thrown away without `keep`.

    On the CPU in fp32, whose generator has the same state on every rank; else in place.
    """
    if parts[0].is_cuda and not on_cpu:
        for part in parts:
            init_method(part)
        return
    whole = torch.empty(sum(len(p) for p in parts), *parts[0].shape[1:], dtype=torch.float32)
    init_method(whole)
    if keep:
        for part, values in zip(parts, whole.split([len(p) for p in parts])):
            part.copy_(values)
