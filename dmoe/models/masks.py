"""Which keys a query sees, and where a sequence is cut so that less is computed than is masked.

Queries are the last S of U positions that start at 0. Legend: B batch, S queries, U positions of the keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QUERY_BLOCK = 1024
"""Queries of a sliding window that are computed at a time, with the keys that any of them sees."""


class Span(NamedTuple):
    """Queries `start` to `stop` of S, which see keys from `first_key` to their own position."""

    start: int
    stop: int
    first_key: int


def spans(queries: int, keys: int, *, window: int = 0, chunk: int = 0) -> list[Span]:
    """Cut the queries at the borders of chunks, or into blocks with a window; one span with neither."""
    offset = keys - queries
    if chunk:
        first = offset - offset % chunk
        borders = [(max(start, offset), min(start + chunk, keys), start) for start in range(first, keys, chunk)]
        return [Span(start - offset, stop - offset, first_key) for start, stop, first_key in borders]
    if window and queries > QUERY_BLOCK:
        starts = range(0, queries, QUERY_BLOCK)
        return [Span(i, min(i + QUERY_BLOCK, queries), max(0, offset + i - window + 1)) for i in starts]
    return [Span(0, queries, max(0, offset - window + 1) if window else 0)]


def visible_keys(
    queries: int, keys: int, device: torch.device, *, window: int = 0, chunk: int = 0, valid_BU: Tensor | None = None
) -> Tensor | None:
    """[S, U], or [B, S, U] with `valid_BU`: True for a key that a query sees. None: S = U, and all up to its own.

    Args:
        window: keys a query sees, its own included. 0: all.
        chunk: keys of other chunks of so many positions are not seen; they are counted from the first valid key.
        valid_BU: False for keys that none but a query of the same position sees: every query sees one key.
    """
    if queries == keys and not window and not chunk and valid_BU is None:
        return None
    positions_U = torch.arange(keys, device=device)
    distance_SU = positions_U[keys - queries :].unsqueeze(1) - positions_U
    visible = distance_SU >= 0
    if window:
        visible = visible & (distance_SU < window)
    if chunk:
        padding_B1 = 0 if valid_BU is None else (valid_BU.cumsum(1) == 0).sum(1, keepdim=True)
        chunks = torch.div(positions_U - padding_B1, chunk, rounding_mode="floor")  # [U] or [B, U]
        visible = visible & (chunks[..., keys - queries :, None] == chunks[..., None, :])
    if valid_BU is not None:
        visible = visible & (valid_BU.unsqueeze(1) | (distance_SU == 0))
    return visible
