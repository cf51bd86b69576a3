"""Experts of transformers 5 models computed by dmoe.

    from dmoe.integrations.transformers import use
    use(model)

`register()` adds two names to transformers: the experts implementation "dmoe", and, where transformers has expert
parallelism with exchangeable implementations, "dmoe_a2a". Weights, their names, checkpoints and the router stay those
of transformers. `replace_moe` (`dmoe.integrations.transformers_legacy`) is for models whose experts are lists of small
modules. transformers is imported when a function is called, not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.errors import ConfigError
from dmoe.integrations.transformers_legacy import replace_moe

NAME = "dmoe"
EP_NAME = "dmoe_a2a"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "config")

__all__ = ["EP_NAME", "NAME", "calls", "check", "register", "replace_moe", "use"]


def register() -> None:
    """Make `experts_implementation="dmoe"` known to transformers, and `ep_implementation="dmoe_a2a"` where there is
    such a choice (`DistributedConfig`; not in transformers 5.17). Any number of times.

    Raises:
        ConfigError: transformers is not installed, or its experts cannot be exchanged.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ConfigError(
            f"transformers with exchangeable experts cannot be imported ({error}): pip install 'transformers>=5.17', "
            "or use dmoe.integrations.transformers.replace_moe"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, _counted_forward)
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError:
        return
    from dmoe.integrations.transformers_parallel import AllToAllExperts

    EPImplementationInterface.register(EP_NAME, AllToAllExperts)


def use(model: Any) -> Any:
    """Compute the experts of `model` by dmoe, or say why that cannot be. Returns the model.

    Registers, selects "dmoe" and calls `check`. The model's first forward is watched as well, unless something with our
    experts in it was compiled: if it has not reached one of them, it ends in an error.

    Args:
        model: a `PreTrainedModel`, loaded with whatever `experts_implementation`.

    Raises:
        ConfigError: the model cannot choose how experts are computed, or has experts that would not follow.
    """
    register()
    if not hasattr(model, "set_experts_implementation"):
        raise ConfigError(
            f"model is a {type(model).__name__}: must be a transformers.PreTrainedModel of transformers 5"
        )
    _refuse_others(model)
    model.set_experts_implementation(NAME)
    check(model)
    model.register_forward_hook(_FirstForward(sum(calls(model).values())))
    return model


class _FirstForward:
    """A forward hook that looks once. A class, because models are pickled with their hooks."""

    def __init__(self, calls_before: int) -> None:
        self.calls_before, self.waits = calls_before, True

    def __call__(self, model: nn.Module, _args: Any, _output: Any) -> None:
        if torch.compiler.is_compiling() or not self.waits:
            return
        self.waits = False
        if _was_traced[0]:  # perhaps in a part of this model
            return
        if sum(calls(model).values()) == self.calls_before:
            raise ConfigError(
                f"experts_implementation is {NAME!r}, and a forward of {type(model).__name__} did not reach it: must "
                "not be changed, nor overruled by other kernels (use_kernels=True), after use(model)"
            )


def check(model: nn.Module) -> None:
    """Refuse a model whose experts are not computed by us, judged by its modules; no forward is run.

    transformers accepts any registered name for any model, and a model whose experts modules do not look at the choice
    (Llama 4, DBRX, JetMoE) computes them as before, without a word. Also finds out how to compute each activation, so
    that `torch.compile` afterwards makes one code for all layers.

    Raises:
        ConfigError: no experts module follows the choice, or only some do; names the model's class, and those modules.
    """
    from dmoe.integrations.transformers_experts import form_of

    _refuse_others(model)
    for name, module in _experts_modules(model):
        form_of(module)
        chosen = getattr(module.config, "_experts_implementation", None)
        if chosen != NAME:
            raise ConfigError(
                f"experts_implementation of {type(model).__name__}.{name} is {chosen!r}: must be {NAME!r}, as "
                "dmoe.integrations.transformers.use(model) sets it"
            )


def _refuse_others(model: nn.Module) -> None:
    found = dict(_experts_modules(model))
    kind = type(model).__name__
    others = {n: type(m).__name__ for n, m in model.named_modules() if n not in found and _is_other_experts(m)}
    if others or not found:
        what = ", ".join(f"{name} ({cls})" for name, cls in list(others.items())[:3]) or "no experts module"
        raise ConfigError(
            f"experts_implementation {NAME!r} is for experts that follow transformers' choice of implementation, and "
            f'{kind} has {what}: must be "eager" for this model, or, for experts in a ModuleList, '
            "dmoe.integrations.transformers.replace_moe(model)"
        )


def calls(model: nn.Module) -> dict[str, int]:
    """How often we computed each experts module of `model`, by its name.

    Recomputed forwards count too. Compiled ones do not: counting would compile them again at every call.
    """
    return {name: module.__dict__.get("_dmoe_calls", 0) for name, module in _experts_modules(model)}


def _counted_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls: [T, D], [T, K] and [T, K] to [T, D]."""
    from dmoe.integrations.transformers_experts import experts_forward

    if torch.compiler.is_compiling():
        _note_trace()
    else:
        module.__dict__["_dmoe_calls"] = module.__dict__.get("_dmoe_calls", 0) + 1
    return experts_forward(module, hidden_states, top_k_index, top_k_weights)


_was_traced = [False]


@torch.compiler.assume_constant_result
def _note_trace() -> bool:
    """Runs when the compiler reads this, not when the code that it made runs."""
    _was_traced[0] = True
    return True


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that look up how to compute experts at each forward, among functions for weights of 16 bits and more."""
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        quantized = not isinstance(down, Tensor) or not down.is_floating_point() or down.element_size() < 2
        if all(hasattr(module, flag) for flag in _FLAGS) and not quantized:
            yield name, module


def _is_other_experts(module: nn.Module) -> bool:
    """Routed experts that do not, as far as their class's name tells."""
    name = type(module).__name__
    return "Expert" in name and "Shared" not in name and next(module.parameters(recurse=False), None) is not None
