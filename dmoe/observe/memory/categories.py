"""What memory is for, and the phases of a step."""

from __future__ import annotations

WEIGHTS = "weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
GATHERED = "gathered weights"
CAST = "weights in another dtype"
WHOLE_GRADIENTS = "gradients before reduction"
ACTIVATIONS = "activations"
LOGITS = "logits"
EXCHANGE = "exchange buffers"
TEMPORARY = "temporaries"
OTHER = "other"
WORKSPACES = "workspaces of kernels"
UNACCOUNTED = "unaccounted"
CATEGORIES = (
    WEIGHTS, GRADIENTS, OPTIMIZER, GATHERED, CAST, WHOLE_GRADIENTS, ACTIVATIONS, LOGITS, EXCHANGE, TEMPORARY, OTHER,
    WORKSPACES,
)  # fmt: skip
"""What an account splits memory into. "other" is what was not seen when it was made: buffers of the model, the
batch, copies inside a collective. `UNACCOUNTED` is what an allocator has beyond an account."""

FORWARD, BACKWARD, UPDATE = "forward", "backward", "optimizer"
PHASES = (FORWARD, BACKWARD, UPDATE)
"""Recomputation belongs to the backward pass; everything after the last backward pass to the optimiser."""
