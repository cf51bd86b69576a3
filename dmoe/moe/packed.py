"""Experts packed for inference on a CPU: `pack_experts(model)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmoe.errors import ConfigError
from dmoe.moe.experts import Experts
from dmoe.moe.sharded import is_plain
from dmoe.ops import expert_mlp
from dmoe.ops.packed import PackedWeights, expert_mlp_packed, why_not_packed
from dmoe.ops.precision import in_autocast

# Elements of an up projection from which packing pays; below, a batched product of plain weights can be faster.
_WORTHWHILE = 2**21


class PackedExperts(nn.Module):
    """`Experts` with packed projections and no parameters but the biases: the experts' weights are frozen.

    Packed products run on the CPU without gradients, autocast and compiler. Whatever else is asked for is computed by
    `expert_mlp` with weights unpacked for that call: gradients of the input and of the routing weights are right, it
    only takes longer. `state_dict()` is that of the plain experts, and unpacks. Loading, and moving to another device
    or dtype, are errors.
    """

    down_bias: nn.Parameter | None

    def __init__(self, experts: Experts) -> None:
        """Packs a copy of the projections; the biases are shared with `experts`."""
        super().__init__()
        self.config, self._up_name = experts.config, experts._up_name
        self.up_proj = PackedWeights(getattr(experts, f"{self._up_name}_proj").detach())
        self.down_proj = PackedWeights(experts.down_proj.detach())
        self.register_parameter(f"{self._up_name}_bias", getattr(experts, f"{self._up_name}_bias"))
        self.register_parameter("down_bias", cast("nn.Parameter | None", experts.down_bias))
        self._trainable = experts.down_proj.requires_grad
        self.train(experts.training)

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """As `Experts.forward`."""
        # The compiler cannot trace packed tensors. No decorator: that would load the compiler with this package.
        compute = torch.compiler.disable(self._compute) if torch.compiler.is_compiling() else self._compute
        return compute(x_TD, topk_ids_TK, topk_weights_TK)

    def _compute(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        biases: tuple[Tensor | None, Tensor | None] = (getattr(self, f"{self._up_name}_bias"), self.down_bias)
        tokens = (x_TD, topk_ids_TK, topk_weights_TK)
        if self._runs_packed(*tokens, *biases):
            return expert_mlp_packed(*tokens, self.up_proj, self.down_proj, *biases, activation=self.config.activation)
        weights = (self.up_proj.unpack(), self.down_proj.unpack())
        return expert_mlp(*tokens, *weights, *biases, activation=self.config.activation, backend=self.config.backend)

    def _runs_packed(self, x: Tensor, ids: Tensor, weights: Tensor, *biases: Tensor | None) -> bool:
        """Whether nothing is asked for that packed weights do not have. What is wrong is left to `expert_mlp`."""
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weights, *biases)):
            return False
        fits = x.dim() == ids.dim() == 2 and x.shape[1] == self.up_proj.shape[2]
        fits = fits and ids.shape == weights.shape and ids.shape[0] == x.shape[0]
        return fits and x.device.type == "cpu" and x.dtype == self.up_proj.dtype and not in_autocast(x)

    def unpacked(self) -> Experts:
        """Plain experts with the same weights, bit by bit."""
        experts = Experts(self.config, device="meta")
        for name, projection in ((f"{self._up_name}_proj", self.up_proj), ("down_proj", self.down_proj)):
            setattr(experts, name, nn.Parameter(projection.unpack(), requires_grad=self._trainable))
        setattr(experts, f"{self._up_name}_bias", getattr(self, f"{self._up_name}_bias"))
        experts.down_bias = self.down_bias
        return experts.train(self.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}{self._up_name}_proj"] = self.up_proj.unpack()
        destination[f"{prefix}down_proj"] = self.down_proj.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError("packed experts cannot be loaded into: load before pack_experts, or unpack_experts first")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        probe = fn(torch.empty(0, dtype=self.up_proj.dtype))
        if probe.device.type != "cpu" or probe.dtype != self.up_proj.dtype:
            raise ConfigError(
                f"packed experts stay {self.up_proj.dtype} on the CPU: unpack_experts before moving the model to "
                f"{probe.dtype} on {probe.device.type!r}"
            )
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        c = self.config
        return f"{c.num_experts} x packed {c.activation} {c.expert_input_size} -> {c.intermediate_size}, bias={c.bias}"


def _can_pack(module: nn.Module) -> bool:
    """Whether packed experts compute what `module` does, and faster."""
    if type(module) is not Experts or module.config.backend not in (None, "torch") or module.config.precision != "same":
        return False
    if module._forward_hooks or module._forward_pre_hooks or module.adds_down_bias is not None:
        return False
    up_proj = getattr(module, f"{module._up_name}_proj")
    if not all(is_plain(parameter) for parameter in module.parameters()):
        return False
    return up_proj[0].numel() >= _WORTHWHILE and why_not_packed(up_proj) is None


def pack_experts(model: nn.Module) -> int:
    """Replace the model's experts by packed ones, for inference on a CPU.

    fp32 and bf16. Experts that cannot be packed, or are too small to gain, stay as they are: those on other devices or
    spread over ranks, with another backend than "torch", and all where this PyTorch lacks the operators. The packed
    form takes the place of the plain one, layer by layer, so memory grows by one layer's experts while packing, and
    not afterwards. An optimiser over the old parameters has no use any more.

    In bf16 packing pays for any number of tokens, in fp32 from about 8; one token alone can be a little slower there
    (`benchmarks/packed_cpu.py`).

    Returns:
        How many layers were packed.
    """
    return _replace(model, _can_pack, PackedExperts)


def unpack_experts(model: nn.Module) -> int:
    """Undo `pack_experts`: plain experts with new parameters. Returns how many layers were unpacked."""
    return _replace(model, lambda module: isinstance(module, PackedExperts), lambda module: module.unpacked())


def _replace(model: nn.Module, wanted: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> int:
    # Paths and no modules, so that each is freed before the next is made.
    paths = [path for path, module in model.named_modules() if path and wanted(module)]
    for path in paths:
        parent_path, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, make(model.get_submodule(path)))
    return len(paths)
