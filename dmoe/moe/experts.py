"""The routed experts' weights, and the shared expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.moe.sharded import local, replicated
from dmoe.ops import expert_mlp
from dmoe.ops.activations import activate
from dmoe.ops.precision import autocast_dtype, in_autocast
from dmoe.ops.regions import region

Weights = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]
"""Up and down projections, and their biases."""


class Experts(nn.Module):
    """E expert MLPs in fused tensors: `gate_up_proj` [E, 2F, D] (rows gate, then up; `up_proj` [E, F, D] for plain
    experts) and `down_proj` [E, D, F], with `gate_up_bias` or `up_bias` and `down_bias` if the config has biases."""

    down_bias: Tensor | None

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        E, D, F = config.num_experts, config.expert_input_size, config.intermediate_size

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self._up_name = "gate_up" if config.gated else "up"
        width = 2 * F if config.gated else F
        self.register_parameter(f"{self._up_name}_proj", empty(E, width, D))
        self.down_proj = empty(E, D, F)
        self.register_parameter(f"{self._up_name}_bias", empty(E, width) if config.bias else None)
        self.register_parameter("down_bias", empty(E, D) if config.bias else None)
        # Set when ranks hold parts of each expert's width, whose results are added: one of them adds the bias.
        self.adds_down_bias: bool | None = None

    def forward(
        self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_rows: int | None = None,
        cast: Weights | None = None,
    ) -> Tensor:  # fmt: skip
        """Of the experts that this rank holds; ids count from its first. `num_rows`: see `dmoe.ops.expert_mlp`. `cast`:
        what `cast_weights` returned."""
        with region("experts"):
            return expert_mlp(
                x_TD,
                topk_ids_TK,
                topk_weights_TK,
                *(self.local_weights() if cast is None else cast),
                activation=self.config.activation,
                backend=self.config.backend,
                precision=self.config.precision,
                num_rows=num_rows,
            )

    def cast_weights(self) -> Weights | None:
        """Under autocast the weights for a call, so that they can be cast before it. None where nothing is to be cast
        yet: those that FSDP shards are gathered when the module is called, in that dtype."""
        if hasattr(self, "unshard") or torch.compiler.is_compiling() or not in_autocast(self.down_proj):
            return None
        dtype = autocast_dtype(self.down_proj)
        up, down, up_bias, down_bias = self.local_weights()
        return up.to(dtype), down.to(dtype), up_bias, down_bias

    def local_weights(self) -> Weights:
        """What this rank computes with: up and down projections, and their biases."""
        up_bias, down_bias = getattr(self, f"{self._up_name}_bias"), self.down_bias
        if down_bias is not None:
            down_bias = local(down_bias) if self.adds_down_bias is None else replicated(down_bias) * self.adds_down_bias
        up_proj = local(getattr(self, f"{self._up_name}_proj"))
        return up_proj, local(self.down_proj), None if up_bias is None else local(up_bias), down_bias

    def extra_repr(self) -> str:
        c = self.config
        kind = "gated" if c.gated else "plain"
        return f"{c.num_experts} x {kind} {c.activation} {c.expert_input_size} -> {c.intermediate_size}, bias={c.bias}"


class FeedForward(nn.Module):
    """A dense MLP, gated or plain: the shared expert, and the feed-forward network of a dense layer."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation

        def linear(n_in: int, n_out: int) -> nn.Linear:
            return nn.Linear(n_in, n_out, bias=bias, device=device, dtype=dtype)

        self.gate_proj = linear(hidden_size, intermediate_size) if gated else None
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(activate(up, self.activation, gated=False).to(up.dtype))
        gate = self.gate_proj(x)
        if self.activation == "silu":  # without the concatenation
            return self.down_proj(torch.nn.functional.silu(gate) * up)
        return self.down_proj(activate(torch.cat([gate, up], dim=-1), self.activation, gated=True).to(up.dtype))
