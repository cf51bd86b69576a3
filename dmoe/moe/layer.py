"""`MoE`: the dropless mixture-of-experts layer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.config import MoEConfig, require
from dmoe.moe.batch_sums import BatchSums, start_batch_sums
from dmoe.moe.dispatch import Dispatcher, dispatch_local
from dmoe.moe.experts import Experts, FeedForward
from dmoe.moe.init import init_parameters
from dmoe.moe.losses import attach_loss
from dmoe.moe.router import Router, Routing
from dmoe.moe.stats import LayerStats
from dmoe.ops import load_balancing_loss, router_z_loss


class MoE(nn.Module):
    """Dropless mixture of experts: every token is computed by its K experts, however uneven the load.

    Parameters (names are stable: a checkpoint is an interface): `router.weight` [E, D], `experts.gate_up_proj`
    [E, 2F, D] with rows gate then up (`experts.up_proj` [E, F, D] for plain experts), `experts.down_proj` [E, D, F],
    and with `shared_intermediate_size` `shared_experts.{gate,up,down}_proj.weight`.

    In training mode the load-balancing loss and the z-loss, times their coefficients, are attached to the output: the
    main loss's `backward()` includes them, nothing has to be collected. Their gradient is multiplied by
    `aux_loss_scale`, which a caller who accumulates gradients over M micro-batches sets to 1 / M
    (`set_aux_loss_scale`). `dmoe.moe.Recorder` reads their values and the load statistics.

    Two attributes say how the layer is spread over ranks; `dmoe.parallel` sets them. `dispatcher` (`dmoe.moe.dispatch`)
    takes tokens to the ranks that hold their experts. `batch_group` are the ranks that share one batch: the losses and
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
        self.aux_loss_scale = 1.0
        self.dispatcher: Dispatcher = dispatch_local
        self.batch_group: dist.ProcessGroup | None = None
        self.stats: LayerStats | None = None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, output_std: float | None = None, seed: int | None = None) -> None:
        """Initialise; see `dmoe.moe.init_parameters`. Does nothing on the meta device."""
        init_parameters(self, std=std, output_std=output_std, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` of shape [T, D] or [B, S, D]; returns the same shape."""
        width = self.config.hidden_size
        if x.dim() not in (2, 3) or x.shape[-1] != width:
            require(False, "MoE input shape", tuple(x.shape), f"[T, {width}] or [B, S, {width}]")
        x_TD = x.reshape(-1, width)
        routing = self.router(x_TD)
        # Before the experts, so that a reduction over ranks runs while they compute.
        sums = start_batch_sums(routing, self.batch_group) if self._attaches else None
        y_TD = self.dispatcher(x_TD, routing, self.experts, self.shared_experts)
        if sums is not None:
            y_TD = self._attach_losses(y_TD, routing, sums)
        elif self.stats is not None:
            # Not earlier: a recomputed forward may end before it waits for what nothing in the graph needs.
            sums = start_batch_sums(routing, self.batch_group)
        if sums is not None and self.stats is not None:
            self.stats.write(sums)
        return y_TD.view(x.shape)

    @property
    def _attaches(self) -> bool:
        config = self.config
        return self.training and torch.is_grad_enabled() and (config.aux_loss_coef > 0 or config.z_loss_coef > 0)

    def _attach_losses(self, y_TD: Tensor, routing: Routing, sums: BatchSums) -> Tensor:
        config, num_tokens = self.config, sums.num_tokens.to(routing.scores_TE.dtype)
        aux_loss = load_balancing_loss(routing.scores_TE, sums.tokens_per_expert_E, config.top_k, num_tokens)
        loss = config.aux_loss_coef * aux_loss + config.z_loss_coef * router_z_loss(routing.logits_TE, num_tokens)
        return attach_loss(y_TD, loss, self.aux_loss_scale)


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
