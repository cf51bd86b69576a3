"""`MoE`: the dropless mixture-of-experts layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig, require
from dmoe.moe.experts import Experts, FeedForward
from dmoe.moe.init import init_parameters
from dmoe.moe.losses import attach_loss
from dmoe.moe.router import Router, Routing
from dmoe.moe.stats import LayerStats
from dmoe.ops import count_tokens_per_expert, load_balancing_loss, router_z_loss


class MoE(nn.Module):
    """Dropless mixture of experts: every token is computed by its K experts, however uneven the load.

    Parameters (names are stable: a checkpoint is an interface): `router.weight` [E, D], `experts.gate_up_proj`
    [E, 2F, D] with rows gate then up (`experts.up_proj` [E, F, D] for plain experts), `experts.down_proj` [E, D, F],
    and with `shared_intermediate_size` `shared_experts.{gate,up,down}_proj.weight`.

    In training mode the load-balancing loss and the z-loss, times their coefficients, are attached to the output: the
    main loss's `backward()` includes them, nothing has to be collected. Their gradient is multiplied by
    `aux_loss_scale`, which a caller who accumulates gradients over M micro-batches sets to 1 / M
    (`set_aux_loss_scale`). `dmoe.moe.Recorder` reads their values and the load statistics.

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
        y_TD = self.experts(x_TD, routing.topk_ids_TK, routing.topk_weights_TK)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return self._attach_losses(y_TD, routing).view(x.shape)

    def _attach_losses(self, y_TD: Tensor, routing: Routing) -> Tensor:
        config = self.config
        attach = self.training and torch.is_grad_enabled() and (config.aux_loss_coef > 0 or config.z_loss_coef > 0)
        if not attach and self.stats is None:
            return y_TD
        tokens_per_expert_E = count_tokens_per_expert(routing.topk_ids_TK, config.num_experts)
        aux_loss = load_balancing_loss(routing.scores_TE, tokens_per_expert_E, config.top_k)
        z_loss = router_z_loss(routing.logits_TE)
        if self.stats is not None:
            self.stats.write(tokens_per_expert_E, routing.scores_TE, aux_loss, z_loss)
        if not attach:
            return y_TD
        loss = config.aux_loss_coef * aux_loss + config.z_loss_coef * z_loss
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
