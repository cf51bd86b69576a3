"""Telling a forward from its repetition by activation checkpointing."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Whether this forward runs inside a backward, which repeats it for its tensors. Always False in the compiler."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
