"""Making one tensor of another format at a time, in the order in which its files want them."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.checkpoint.formats.mapping import Stored, Unit
from dmoe.checkpoint.formats.store import Source


def assemble(source: Source, stored: Stored, dtype: torch.dtype) -> Tensor:
    """The stored tensor, made of those of `source`; padding is 0. Holds those it is made of: a parameter, or a row."""
    tensor = torch.zeros(stored.shape, dtype=dtype)
    units: dict[Unit, Tensor] = {}
    for part in stored.parts:
        if part.unit not in units:
            units[part.unit] = source.read(part.unit.name, part.unit.index)
        place = part.place(tensor if part.stored_index is None else tensor[part.stored_index])
        ours = part.view(units[part.unit])
        if place.shape != ours.shape:
            raise ValueError(f"{stored.name}: {list(ours.shape)} of {part.ours} go to a region {list(place.shape)}")
        place.copy_(ours)
    return tensor
