"""Where a number that is not finite first appears in a forward and backward pass of this rank."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.models import Decoder
from dmoe.moe import Experts, moe_layers
from dmoe.moe.recompute import recomputing
from dmoe.moe.sharded import local, owned_indices

_MAX_NAMED = 8
_numbers = itertools.count()


@dataclass(frozen=True)
class Event:
    """The first place, on this rank."""

    backward: bool
    position: int
    """Hooks called before it: ranks run the same modules in the same order."""
    text: str
    stage: int = 0
    """The first layer of the pipeline stage that it was in."""
    received: bool = False
    """It came from another pipeline stage."""


class Trace:
    """Hooks on all modules of `parts` while its context is entered; afterwards `first` is what they saw.

    Looks at every input and output, which waits for the device each time. Compiled modules run as they were before, as
    a hook inside a graph would break it.

    Args:
        backward: whether to look at gradients between modules too. Not where a schedule splits a backward.
    """

    def __init__(self, parts: Sequence[Decoder], *, backward: bool = True) -> None:
        self.first: Event | None = None
        self.largest_output = 0.0
        """Of the parts: for logits that are finite and too large."""
        self._parts, self._backward = parts, backward
        self._position = 0
        self._newest: int | None = None
        self._experts = {id(layer.experts): layer for part in parts for layer in moe_layers(part).values()}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Set the hooks, and remove them."""
        with contextlib.ExitStack() as stack:
            for part in self._parts:
                for name, module in part.named_modules():
                    before = partial(self._enter, name, part)
                    after = partial(self._leave, name, part)
                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
                    stack.enter_context(_uncompiled(module))
            yield

    @torch.no_grad()  # what is looked at here must not be kept for the backward, least of all by a checkpoint
    def _enter(self, name: str, part: Decoder, module: nn.Module, args: Any, kwargs: Any) -> None:
        if recomputing():
            return
        self._position += 1
        inputs = _tensors(args, kwargs)
        bad = next((x for x in inputs if _is_bad(x)), None) if self.first is None else None
        if bad is not None:
            received = module is part and not part.is_first
            why = "it came from the stage before" if received else "all outputs of modules before it are finite"
            self._note(part, f"{name or 'the model'}: its input has {describe(bad)}, {why}", received=received)
        self._hook_gradients(inputs, partial(self._input_gradient, name, part, module, args))

    @torch.no_grad()
    def _leave(self, name: str, part: Decoder, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if recomputing():
            return
        self._position += 1
        outputs = _tensors(output)
        if module is part and outputs:
            self.largest_output = max(self.largest_output, max(float(_largest(y)) for y in outputs))
        if self.first is None:
            bad = next((y for y in outputs if _is_bad(y)), None)
            if bad is not None:
                where = "".join(self._rows(module, args, bad))
                self._note(part, f"{name or 'the model'}: output has {describe(bad)}{where}, its inputs are finite")
        after = partial(self._output_gradient, name, part, module is part and not part.is_last)
        self._hook_gradients(outputs, after)

    def _rows(self, module: nn.Module, args: Any, output: Tensor) -> Iterator[str]:
        """Which tokens, and of experts which of them."""
        if output.dim() < 2:
            return
        bad_T = ~torch.isfinite(output).flatten(0, -2).all(dim=-1)
        if not isinstance(module, Experts):
            tokens = bad_T.nonzero().flatten().tolist()
            if len(tokens) < len(bad_T):
                yield f" in {_listed('token', tokens)} of {len(bad_T)}"
            return
        ids_TK, layer = args[1], self._experts[id(module)]
        dispatcher: Any = layer.dispatcher
        spread = hasattr(dispatcher, "num_experts")
        num_local = layer.config.num_experts // (dispatcher.group.size() if spread else 1)
        first = dispatcher.group.rank() * num_local if spread else 0
        picked = [ids_TK == e for e in range(num_local)]
        whole = [e + first for e, p in enumerate(picked) if p.any() and bad_T[p.any(dim=1)].all()]
        yield f" in {int(bad_T.sum())} of {len(bad_T)} rows"
        if whole:
            yield f", all rows of {_listed('expert', whole)}"

    def _hook_gradients(self, tensors: list[Tensor], look: Callable[[int, Tensor], None]) -> None:
        for x in tensors:
            if self._backward and x.requires_grad:
                # Not id(x): a tensor that is freed gives it to another, while its hook stays.
                number = vars(x).setdefault("_trace_number", next(_numbers))
                x.register_hook(partial(look, number))

    def _input_gradient(
        self, name: str, part: Decoder, module: nn.Module, args: Any, tensor: int, gradient: Tensor
    ) -> None:
        where = f"backward of {name or 'the model'}: the gradient of its input has"
        rows = (lambda: "".join(self._rows(module, args, gradient))) if isinstance(module, Experts) else str
        end = "that of its output is finite"
        self._gradient(part, tensor, gradient, lambda: f"{where} {describe(gradient)}{rows()}, {end}")

    def _output_gradient(self, name: str, part: Decoder, received: bool, tensor: int, gradient: Tensor) -> None:
        verb = "came from the next stage with" if received else "has"
        where = f"backward of what follows {name or 'the model'}: the gradient of its output {verb}"
        self._gradient(part, tensor, gradient, lambda: f"{where} {describe(gradient)}", received=received)

    def _gradient(
        self, part: Decoder, tensor: int, gradient: Tensor, text: Callable[[], str], *, received: bool = False
    ) -> None:
        self._position += 1
        # The input of a module is often that of its first child, which is asked later: the innermost is named.
        again = self.first is not None and self._newest == tensor
        if (self.first is None or again) and _is_bad(gradient):
            position = self._position if self.first is None else self.first.position
            self.first, self._newest = Event(True, position, text(), _stage(part), received), tensor
        elif not again:
            self._newest = None

    def _note(self, part: Decoder, text: str, *, received: bool = False) -> None:
        self.first = Event(False, self._position, text, _stage(part), received)


def bad_parameters(module: nn.Module, *, recurse: bool = True, gradients: bool = False) -> list[str]:
    """A phrase for each parameter of a module whose part on this rank, or its gradient, is not finite."""
    phrases = []
    for name, parameter in module.named_parameters(recurse=recurse):
        tensor: Any = parameter.grad if gradients else parameter
        if tensor is None:
            continue
        values = local(tensor.detach())
        if _is_bad(values):
            what = "the gradient of" if gradients else "the weight"
            experts = _experts_of(module, name, parameter, values)
            phrases.append(f"{what} {name} has {describe(values)}{experts}")
    return phrases


def describe(values: Tensor) -> str:
    """12 NaN of 4096."""
    nan, inf = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
    counts = [f"{count} {name}" for count, name in ((nan, "NaN"), (inf, "Inf")) if count]
    return f"{' and '.join(counts)} of {values.numel()}"


def _experts_of(module: nn.Module, name: str, parameter: Any, values: Tensor) -> str:
    owner = module.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, Experts):
        return ""
    numbers = [i for run in owned_indices(parameter)[0] for i in run]
    bad = (~torch.isfinite(values)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return f" in {_listed('expert', [numbers[i] for i in bad])}"


def _stage(part: Decoder) -> int:
    return min((int(number) for number, _ in part.layers.named_children()), default=0)


def _tensors(*values: Any) -> list[Tensor]:
    """The floating-point tensors in nested arguments."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found.append(value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
        elif isinstance(value, (list, tuple)):
            found += _tensors(*value)
    return found


def _is_bad(values: Tensor) -> bool:
    return not bool(torch.isfinite(local(values.detach())).all())


def _largest(values: Tensor) -> Tensor:
    return local(values.detach()).abs().amax() if values.numel() else torch.zeros(())


def _listed(word: str, numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_MAX_NAMED])) + (", ..." if len(numbers) > _MAX_NAMED else "")
    return f"{word if len(numbers) == 1 else word + 's'} {shown}"


@contextlib.contextmanager
def _uncompiled(module: nn.Module) -> Iterator[None]:
    compiled = module._compiled_call_impl
    module._compiled_call_impl = None
    try:
        yield
    finally:
        module._compiled_call_impl = compiled
