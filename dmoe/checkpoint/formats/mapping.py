"""How the tensors of another format are made of ours, as data that is used in both directions.

A `Stored` tensor is put together from `Part`s. A part names a region of one of our parameters and a region of the
stored tensor, each as a view, and the two have the same shape: reading copies the stored region into ours, writing
copies ours into the stored one. So a format is one list, and what one direction does the other undoes.

Large fused tensors are handled a row of dim 0 (an expert) at a time: a part then gives that row's number on our side
(`index`), on the stored side (`stored_index`), or on both, and its views are of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Unit:
    """What is read or written at once of our model: a parameter or buffer, or one expert's row of it."""

    name: str
    index: int | None = None


def whole(tensor: Tensor) -> Tensor:
    """The region that is everything."""
    return tensor


@dataclass(frozen=True)
class Part:
    """A region of ours and the region of a stored tensor that holds the same numbers."""

    ours: str
    """Name of our parameter or buffer, as in `Decoder.state_dict()`."""
    index: int | None = None
    """Row of dim 0 of ours that the part is about; None: all of it."""
    view: View = whole
    """The region of ours (of its row): a view, never a copy."""
    stored_index: int | None = None
    """Row of dim 0 of the stored tensor; None: all of it."""
    place: View = whole
    """The region of the stored tensor (of its row): a view, never a copy."""

    @property
    def unit(self) -> Unit:
        return Unit(self.ours, self.index)


@dataclass(frozen=True)
class Stored:
    """A tensor of the other format. Its parts cover it, but for rows that are padding."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dtype: torch.dtype | None = None
    """The only dtype that the format has for it; None: that of the model."""
    padded: bool = False
    """Whether regions that no part covers are allowed; they are written as zeros."""


Mapping = Sequence[Stored]


def same(name: str, ours: str, *shape: int) -> Stored:
    """A stored tensor that is one of ours under another name."""
    return Stored(name, shape, (Part(ours),))
