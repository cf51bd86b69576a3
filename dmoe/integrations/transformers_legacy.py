"""`replace_moe`: mixture-of-experts blocks of transformers 4.5x, whose experts are a list of small modules, computed by
dmoe. Imports nothing of transformers, so that models with code of their own in that layout are served too.

The layout: a block has `gate`, an `nn.Linear` [E, D]; `experts`, an `nn.ModuleList` of E modules with the linear maps
w1 (gate), w3 (up), w2 (down) or gate_proj, up_proj, down_proj, and `act_fn`; `top_k`; in OLMoE and Qwen
`norm_topk_prob`, in Qwen2-MoE `shared_expert` and `shared_expert_gate`, in Mixtral `jitter_noise`. It returns (hidden
states [B, S, D], router logits [B*S, E]).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import require
from dmoe.errors import ConfigError
from dmoe.integrations.transformers_experts import experts_forward, form_of
from dmoe.ops.routing import route

# All choose by a softmax over all experts, which their layout alone would not say.
BLOCKS = ("MixtralSparseMoeBlock", "OlmoeSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock")
_NAMES = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))  # gate, up, down


def replace_moe(model: nn.Module) -> list[str]:
    """Compute the experts of every block of that layout in `model` by dmoe; in place.

    The block stays the module it is, of a subclass of its class, with its gate and shared expert. Its experts become
    `experts.gate_up_proj` [E, 2F, D] and `experts.down_proj` [E, D, F]: parameters change, so call it before an
    optimiser, FSDP or hooks on the block exist. State dicts keep the names of the single experts
    (`experts.0.w1.weight`), written and read: `save_pretrained` and checkpoints stay as they were. Routing weights are
    not rounded to the dtype of the model, as 4.5x does. A model that was replaced already stays as it is.

    Returns:
        The names of the blocks.

    Raises:
        ConfigError: there is no such block, or the experts of one differ in shape, dtype, device or in being trained,
            have biases, or have hooks that replaced its forward. Then nothing was changed.
    """
    blocks = {name: block for name, block in model.named_modules() if _is_block(block)}
    replaced = [name for name, block in blocks.items() if isinstance(block.experts, FusedExperts)]
    waiting = {name: block for name, block in blocks.items() if name not in replaced}
    if not blocks:
        raise ConfigError(
            f"model {type(model).__name__} has no block that replace_moe knows: must be one of {', '.join(BLOCKS)} "
            "with experts in a ModuleList; for transformers 5 use dmoe.integrations.transformers.use(model)"
        )
    for name, block in waiting.items():
        _check(name, block)
    for block in waiting.values():
        block.experts = FusedExperts(block.experts)
        block.__class__ = _fused_class(block.__class__)
    return list(blocks)


def _is_block(module: Any) -> bool:
    named = any(cls.__name__ in BLOCKS for cls in type(module).__mro__)
    return named and isinstance(getattr(module, "experts", None), (nn.ModuleList, FusedExperts))


def _names(expert: nn.Module) -> tuple[str, str, str] | None:
    """What the gate, up and down projections of an expert are called."""
    return next((names for names in _NAMES if all(hasattr(expert, name) for name in names)), None)


def _check(name: str, block: Any) -> None:
    path = f"{name or type(block).__name__}.experts"
    names = _names(block.experts[0]) if len(block.experts) else None
    require(names is not None, path, block.experts, "modules with w1, w2, w3 or gate_proj, up_proj, down_proj")
    require("forward" not in block.__dict__, f"{name}.forward", "replaced by a hook", "replaced after replace_moe")
    assert names is not None
    first = [getattr(block.experts[0], n).weight for n in names]
    for e, expert in enumerate(block.experts):
        for n, like in zip(names, first):
            linear = getattr(expert, n, None)
            if not isinstance(linear, nn.Linear) or linear.bias is not None:
                require(False, f"{path}.{e}.{n}", linear, "nn.Linear without bias")
            assert isinstance(linear, nn.Linear)
            for what in ("shape", "dtype", "device", "requires_grad"):
                got, wanted = getattr(linear.weight, what), getattr(like, what)
                require(got == wanted, f"{path}.{e}.{n}.weight.{what}", got, f"{wanted}, that of expert 0")
    require(
        first[0].requires_grad == first[1].requires_grad and first[0].shape == first[1].shape,
        f"{path}.0.{names[1]}.weight", (tuple(first[1].shape), first[1].requires_grad), f"like {names[0]}'s",
    )  # fmt: skip


class FusedExperts(nn.Module):
    """The experts of a list in fused tensors, whose state dict has the names of the list.

    Its attributes are those of an experts module of transformers 5. Takes the weights over: the list is empty after.
    """

    has_gate, has_bias, is_transposed, _is_expert_parallel = True, False, False, False

    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        names = _names(experts[0])
        assert names is not None
        self.legacy_names = names
        self.act_fn: Any = experts[0].act_fn
        gate, _, down = (getattr(experts[0], name).weight for name in names)
        F, D = gate.shape
        gate_up_proj, down_proj = gate.new_empty(len(experts), 2 * F, D), down.new_empty(len(experts), D, F)
        self.gate_up_proj = nn.Parameter(gate_up_proj, requires_grad=gate.requires_grad)
        self.down_proj = nn.Parameter(down_proj, requires_grad=down.requires_grad)
        for e, expert in enumerate(experts):
            with torch.no_grad():
                for part, name in zip(self._parts(e), names):
                    part.copy_(getattr(expert, name).weight)
            experts[e] = nn.Identity()  # so that weights are there twice for one expert only
        form_of(self)

    def _parts(self, e: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views: gate [F, D], up [F, D], down [D, F] of an expert."""
        gate, up = self.gate_up_proj[e].chunk(2)
        return gate, up, self.down_proj[e]

    def _named_parts(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for e in range(self.down_proj.shape[0]):
            for name, part in zip(self.legacy_names, self._parts(e)):
                yield f"{prefix}{e}.{name}.weight", part

    def _apply_gate(self, h_RH: Tensor) -> Tensor:
        gate, up = h_RH.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """[T, D], [T, K] and [T, K] to [T, D]."""
        return experts_forward(self, x_TD, topk_ids_TK, topk_weights_TK)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, part in self._named_parts(prefix):
            destination[key] = part if keep_vars else part.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if local_metadata.get("assign_to_params_buffers"):
            self._take_over(state_dict, prefix)
        parts = dict(self._named_parts(prefix))
        for key, part in parts.items():
            value = state_dict.get(key)
            if value is None:
                if strict:
                    missing_keys.append(key)
            elif value.shape != part.shape:
                error_msgs.append(f"size mismatch for {key}: {tuple(value.shape)}, must be {tuple(part.shape)}")
            else:
                with torch.no_grad():
                    part.copy_(value)
        if strict:
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in parts)

    def _take_over(self, state_dict: dict[str, Any], prefix: str) -> None:
        """For `load_state_dict(..., assign=True)`: parameters with the device and dtype of what is loaded."""
        found = next((state_dict[key] for key, _ in self._named_parts(prefix) if key in state_dict), None)
        if found is not None:
            for name, old in self.named_parameters(recurse=False):
                new = torch.empty(old.shape, dtype=found.dtype, device=found.device)
                setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))

    def extra_repr(self) -> str:
        E, D, F = self.down_proj.shape
        return f"{E} experts, {D} -> {F}"


@functools.cache
def _fused_class(cls: Any) -> Any:
    """A subclass of a block's class: what looks for the class (recorders of router logits, FSDP policies) finds it."""
    return type(f"Dmoe{cls.__name__}", (cls,), {"forward": _forward, "__module__": cls.__module__})


def _forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, D] to ([B, S, D], router logits [B*S, E])."""
    if self.training and getattr(self, "jitter_noise", 0.0) > 0:
        noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
        hidden_states = hidden_states * noise
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits_TE = self.gate(x_TD)
    wide = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    # Mixtral's blocks have no such choice: they always divide.
    normalize = bool(getattr(self, "norm_topk_prob", True))
    _, ids_TK, weights_TK = route(wide, self.top_k, score_function="softmax", normalize=normalize)
    y_TD = self.experts(x_TD, ids_TK, weights_TK)
    if getattr(self, "shared_expert", None) is not None:
        y_TD = y_TD + torch.sigmoid(self.shared_expert_gate(x_TD)) * self.shared_expert(x_TD)
    return y_TD.to(hidden_states.dtype).view(hidden_states.shape), logits_TE
