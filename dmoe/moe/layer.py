"""`MoE`: the mixture-of-experts layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig, require
from dmoe.moe.batch_sums import BatchGroups, BatchSums, SequenceSums, sequence_sums, start_batch_sums
from dmoe.moe.dispatch import Dispatcher, SharedFunction, dispatch_local
from dmoe.moe.experts import Experts, FeedForward
from dmoe.moe.init import init_parameters
from dmoe.moe.losses import attach_loss, auxiliary_loss
from dmoe.moe.recompute import recomputing
from dmoe.moe.router import Router, Routing
from dmoe.moe.sharded import replicated_linear
from dmoe.moe.slots import Slots, sum_slots, take_rows
from dmoe.moe.stats import LayerStats, StepLoad
from dmoe.moe.weighed import sum_picks_of_tokens, weigh, weighed_rows
from dmoe.ops.precision import autocast_dtype
from dmoe.ops.regions import region


class MoE(nn.Module):
    """Mixture of experts; dropless: every token is computed by its K experts, however uneven the load, unless the
    config has a `capacity_factor`.

    Parameters (names are stable: a checkpoint is an interface): `router.weight` [E, D], `experts.gate_up_proj`
    [E, 2F, D] with rows gate then up (`experts.up_proj` [E, F, D] for plain experts), `experts.down_proj` [E, D, F];
    where the config asks for them `router.bias` [E], `shared_experts.{gate,up,down}_proj.weight`,
    `shared_expert_gate.weight` [1, D], and `fc1_latent_proj.weight` [L, D] and `fc2_latent_proj.weight` [D, L], between
    which D is L in the shapes of the experts. Buffer: `router.e_score_correction_bias` [E].

    In training mode the balancing losses and the z-loss, times their coefficients, are attached to the output: the
    main loss's `backward()` includes them, nothing has to be collected. Their gradient is multiplied by
    `aux_loss_scale`, which a caller who accumulates gradients over M micro-batches sets to 1 / M
    (`set_aux_loss_scale`). `dmoe.moe.Recorder` reads their values and the load statistics. What is balanced over whole
    optimiser steps also needs a `dmoe.moe.LoadBalancer`.

    Two attributes say how the layer is spread over ranks; `dmoe.parallel` sets them. `dispatcher` (`dmoe.moe.dispatch`)
    takes tokens to the ranks that hold their experts. `groups` are the ranks that share one batch: the losses and
    statistics are those of the whole batch, and each rank's gradient is its share, to be summed over the ranks.

    Args:
        config: the layer; `config.hidden_size` must be set.
        device, dtype: of the parameters. On "meta" the parameters are left uninitialised: materialise them and call
            `reset_parameters`.
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        require(config.hidden_size > 0, "moe.hidden_size", config.hidden_size, "greater than 0")
        self.config = config
        self.router = Router(config, device=device, dtype=dtype)
        self.experts = Experts(config, device=device, dtype=dtype)
        self.shared_experts = (
            FeedForward(
                config.hidden_size,
                config.shared_intermediate_size,
                activation=config.activation,
                gated=config.gated,
                bias=config.bias,
                device=device,
                dtype=dtype,
            )
            if config.shared_intermediate_size
            else None
        )
        D, L = config.hidden_size, config.latent_size

        def linear(n_in: int, n_out: int) -> nn.Linear:
            return nn.Linear(n_in, n_out, bias=False, device=device, dtype=dtype)

        self.shared_expert_gate = linear(D, 1) if config.shared_expert_gate else None
        self.fc1_latent_proj = linear(D, L) if L else None
        self.fc2_latent_proj = linear(L, D) if L else None
        self.aux_loss_scale = 1.0
        self.dispatcher: Dispatcher = dispatch_local
        self.groups = BatchGroups()
        self.stats: LayerStats | None = None
        self.step_load: StepLoad | None = None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, output_std: float | None = None, seed: int | None = None) -> None:
        """Initialise; see `dmoe.moe.init_parameters`. Does nothing on the meta device."""
        init_parameters(self, std=std, output_std=output_std, seed=seed)
        self.router.reset_buffers()

    def leave_experts_uncompiled(self) -> None:
        """Compute the experts, and take tokens to them and back, outside the graphs of torch.compile, which then has a
        graph before them and one after. For experts that FSDP gathers, whose hooks a graph does not run, and for an
        exchange, which reads its counts on the host. A copy.deepcopy of the layer made afterwards would compute with
        the experts of the original."""
        self._compute = torch.compiler.disable(self._compute)  # type: ignore[method-assign]

    def forward(self, x: Tensor, token_mask: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
        """Apply the layer to `x` of shape [T, D] or [B, S, D]; returns the same shape.

        Args:
            token_mask: bool, [T] or [B, S]: False for padding, which may hold anything, goes to no expert, costs
                nothing in a loss and is counted nowhere, but in the T of a capacity. Its output is what the shared
                expert makes of zeros: 0 without biases. None: no padding.
            token_ids: integers of the same shape, for routing "hash".
        """
        self._check_input(x, token_mask, token_ids)
        num_sequences = x.shape[0] if x.dim() == 3 else 1
        x_TD = x.reshape(-1, x.shape[-1])
        valid_T, ids_T = (None if t is None else t.reshape(-1) for t in (token_mask, token_ids))
        if valid_T is not None:
            x_TD = x_TD.masked_fill(~valid_T.unsqueeze(1), 0.0)  # whatever padding holds
        with region("routing"):
            routing = self.router(x_TD, valid_T, ids_T, self.groups.batch)
        attaches = self.training and torch.is_grad_enabled() and self.config.attaches_losses
        # Before the experts, so that a reduction over ranks runs while they compute.
        sums, sequences = self._start_sums(routing, num_sequences) if attaches else (None, None)
        y_TD = self._compute(self._to_send(x_TD, routing), routing)
        if sums is not None:
            loss = auxiliary_loss(self.config, routing, sums, sequences)
            y_TD = attach_loss(y_TD, loss, self.aux_loss_scale)
        elif self._records:
            # Not earlier: a recomputed forward may end before it waits for what nothing in the graph needs.
            sums, _ = self._start_sums(routing, num_sequences)
        if sums is not None and not recomputing():
            self._record(sums)
        return y_TD.view(x.shape)

    def _to_send(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Tokens in the dtype in which a dispatcher sends them, cast in the graph of the router if there is one. Not
        those of which something else is made before, in their own precision."""
        changes = self.fc1_latent_proj is not None or self.config.weigh_input or routing.slots is not None
        return x_TD if changes or self.dispatcher is dispatch_local else x_TD.to(autocast_dtype(x_TD))

    def _compute(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Shared and routed experts."""
        if self.fc1_latent_proj is None or self.fc2_latent_proj is None:
            return self._dispatch(x_TD, routing, self._shared)
        x_TL = replicated_linear(x_TD, self.fc1_latent_proj)
        y_TD = replicated_linear(self._dispatch(x_TL, routing, None), self.fc2_latent_proj)
        return y_TD if self._shared is None else y_TD + self._shared(x_TD)

    def _dispatch(self, x_TD: Tensor, routing: Routing, shared: SharedFunction | None) -> Tensor:
        if routing.slots is not None:
            y_TD = self._dispatch_slots(x_TD, routing, routing.slots)
            return y_TD if shared is None else y_TD + shared(x_TD)
        if not self.config.weigh_input:
            return self.dispatcher(x_TD, routing, self.experts, shared)
        rows_RD, of_rows = weighed_rows(x_TD, routing)
        if self.config.top_k == 1:  # a row is a token, and the shared expert runs while it travels
            of_tokens = None if shared is None else (lambda _: shared(x_TD))
            return self.dispatcher(rows_RD, of_rows, self.experts, of_tokens)
        y_TD = sum_picks_of_tokens(self.dispatcher(rows_RD, of_rows, self.experts, None), routing.topk_ids_TK)
        return y_TD if shared is None else y_TD + shared(x_TD)

    def _dispatch_slots(self, x_TD: Tensor, routing: Routing, slots: Slots) -> Tensor:
        num_experts, capacity = slots.tokens_EC.shape
        ids_R = torch.arange(num_experts, device=x_TD.device).repeat_interleave(capacity)
        rows_RD, weights_R1 = take_rows(x_TD, slots), slots.weights_EC.reshape(-1, 1)
        if self.config.weigh_input:
            rows_RD, weights_R1 = weigh(rows_RD, weights_R1), torch.ones_like(weights_R1)
        of_slots = routing._replace(topk_ids_TK=ids_R.unsqueeze(1), topk_weights_TK=weights_R1, even=True)
        return sum_slots(self.dispatcher(rows_RD, of_slots, self.experts, None), slots, x_TD.shape[0])

    @property
    def _shared(self) -> SharedFunction | None:
        return self.shared_experts if self.shared_expert_gate is None else self._gated_shared_experts

    def _gated_shared_experts(self, x_TD: Tensor) -> Tensor:
        assert self.shared_experts is not None
        assert self.shared_expert_gate is not None
        return torch.sigmoid(replicated_linear(x_TD, self.shared_expert_gate)) * self.shared_experts(x_TD)

    def _start_sums(self, routing: Routing, num_sequences: int) -> tuple[BatchSums, SequenceSums | None]:
        sequences = None
        if self.config.seq_aux_loss_coef:
            sequences = sequence_sums(routing, num_sequences, self.groups.sequence)
        load = self.step_load if self.config.global_aux_loss_coef else None
        return start_batch_sums(routing, self.groups, sequences, None if load is None else load.step_E), sequences

    @property
    def _records(self) -> bool:
        return self.stats is not None or (self.training and self.step_load is not None)

    def _record(self, sums: BatchSums) -> None:
        if self.training and self.step_load is not None:
            self.step_load.write(sums)
        if self.stats is not None:
            self.stats.write(sums)

    def _check_input(self, x: Tensor, token_mask: Tensor | None, token_ids: Tensor | None) -> None:
        width = self.config.hidden_size
        if x.dim() not in (2, 3) or x.shape[-1] != width:
            require(False, "MoE input shape", tuple(x.shape), f"[T, {width}] or [B, S, {width}]")
        for name, tensor in (("token_mask", token_mask), ("token_ids", token_ids)):
            if tensor is not None and tensor.shape != x.shape[:-1]:
                require(False, f"MoE {name} shape", tuple(tensor.shape), f"{tuple(x.shape[:-1])}, that of the tokens")
        if token_mask is not None and token_mask.dtype != torch.bool:
            require(False, "MoE token_mask dtype", token_mask.dtype, "torch.bool, False for padding")
        if token_ids is not None and token_ids.is_floating_point():
            require(False, "MoE token_ids dtype", token_ids.dtype, "an integer dtype")


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The MoE layers of `model` by module name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def set_aux_loss_scale(model: nn.Module, scale: float) -> None:
    """Multiply the gradient of every MoE layer's auxiliary losses by `scale`.

    Use 1 / M when M micro-batches, each with a mean loss divided by M, accumulate into one step, and the loss scale
    of a GradScaler times that under fp16.
    """
    for layer in moe_layers(model).values():
        layer.aux_loss_scale = scale
