"""Gradients of tokens that travel back while those of the experts' weights are still computed.

A backward returns all of its gradients at once, so what autograd would send back next waits for those of the weights.
Instead the experts' backward hands over the tokens' gradients when it has them (`inputs_first`), a message starts
(`EarlyGradients`), and the node of the graph that would send them finds it under way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from dmoe.ops.messages import wait

InputGradients = Callable[[Tensor, Tensor], None]
"""Takes the gradients of tokens and of routing weights."""

_receiver: ContextVar[InputGradients | None] = ContextVar("receiver of input gradients", default=None)


@contextlib.contextmanager
def inputs_first(receiver: InputGradients) -> Iterator[None]:
    """Experts that are called in here hand the gradients of their tokens and routing weights to `receiver` in the
    backward, if their backend can, before they compute those of their weights. They return them as ever."""
    before = _receiver.set(receiver)
    try:
        yield
    finally:
        _receiver.reset(before)


def receiver_of_inputs() -> InputGradients | None:
    """Of the innermost `inputs_first`. None inside the compiler, which plans a backward by itself."""
    return None if torch.compiler.is_compiling() else _receiver.get()


class EarlyGradients:
    """Messages of gradients, started when `computed` is called, or else when they are asked for.

    Args:
        send: starts them; takes the gradients of tokens [S, D] and of routing weights [S, ...]. It is collective, and
            called on all ranks or on none.
        width, weight_dtype: D and the dtype of the routing weights, as they were received. Experts that padded or cast
            them have other gradients, which do not start.
    """

    def __init__(
        self, send: Callable[[Tensor, Tensor], tuple[Tensor, ...]], width: int, weight_dtype: torch.dtype
    ) -> None:
        self._send, self._form = send, (width, weight_dtype)
        self._started: tuple[tuple[object, ...], Tensor, Tensor, tuple[Tensor, ...]] | None = None

    def computed(self, grad_SD: Tensor, grad_weights: Tensor) -> None:
        """Start the messages. With the gradients they are kept until they are asked for."""
        self._drop()
        if (grad_SD.shape[1], grad_weights.dtype) == self._form:
            self._started = _mark(grad_SD, grad_weights), grad_SD, grad_weights, self._send(grad_SD, grad_weights)

    def messages(self, grad_SD: Tensor, grad_weights: Tensor) -> tuple[Tensor, ...]:
        """Those under way, if they hold these gradients: what lies between the experts and the exchange may have made
        others of them. It does so on all ranks or on none."""
        if self._started is not None and self._started[0] == _mark(grad_SD, grad_weights):
            under_way, self._started = self._started[-1], None
            return under_way
        self._drop()
        return self._send(grad_SD, grad_weights)

    def _drop(self) -> None:
        """Messages that nobody will ask for are waited for: torch keeps those that are not."""
        for message in () if self._started is None else self._started[-1]:
            wait(message)
        self._started = None


def _mark(grad_SD: Tensor, grad_weights: Tensor) -> tuple[object, ...]:
    """Tells tensors from others, those without elements too; of weights without the shape, which may get a dim more."""
    of_each = ((t.untyped_storage()._cdata, t.storage_offset(), t._version) for t in (grad_SD, grad_weights))
    return (*of_each, grad_SD.shape, grad_weights.numel())
