"""An activation applied to hidden states, with its gradient on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmoe.compat.megablocks.layers.matrix import map_values, values


def act_fn(x: Any, function: Callable[..., Tensor], return_grad_fn: bool = False, **kwargs: Any) -> Any:
    """`function(x, **kwargs)` for a tensor, or for the values of an `stk.Matrix`.

    Args:
        return_grad_fn: also return the function that, called with the gradient of the result, adds the gradient of `x`
            to `x.grad` (`x.data.grad` of a matrix). This works under `torch.no_grad` too, as in the forward of an
            autograd function; for that `x`, then a leaf, is made to require a gradient.

    Returns:
        the result, of the kind of `x`, or (result, gradient function).
    """
    if not return_grad_fn:
        return map_values(x, lambda data: function(data, **kwargs))
    with torch.enable_grad():
        inputs = values(x)
        if not inputs.requires_grad:
            inputs.requires_grad_(True)
        result = map_values(x, lambda data: function(inputs, **kwargs))
    return result, values(result).backward
