"""Experts that a token goes to whatever its router says: by its id, at random, in turn.

Legend: T tokens, E experts, K picks a token. Ids are int64, and the K of a token are distinct.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from dmoe.config import require

_BITS_32 = 0xFFFFFFFF

Integers = TypeVar("Integers", int, Tensor)


def _check_top_k(top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        require(False, "top_k", top_k, f"from 1 to the {num_experts} experts")


def _mix(x: Integers) -> Integers:
    """A bijection of 32 bits, held in int64, that looks random: xors with shifts, and products that fit 63 bits."""
    x = (x + 0x9E3779B9) & _BITS_32  # 0 must not stay 0
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & _BITS_32
    return x ^ (x >> 16)


def hash_assignment(token_ids_T: Tensor, num_experts: int, top_k: int, seed: int = 0) -> Tensor:
    """ids_TK: a fixed pseudo-random function of (seed, token id), as in hash layers (Roller et al., arXiv:2106.04426).

    Balanced over ids: of each E token ids that follow a multiple of E, every expert is pick k of exactly one, for each
    k. How even the load is depends on how often the ids occur.

    Computed on the device of the ids with integer arithmetic, without a table, with memory for T * E integers: a
    block of E token ids has an order of the experts, by the hash of (seed, block, expert); an id takes the K experts
    from its own place in the block on, going round.

    Args:
        token_ids_T: integers.
        seed: an integer, of which the lowest 32 bits count; give every layer its own.

    Raises:
        ConfigError: top_k is out of range.
    """
    _check_top_k(top_k, num_experts)
    device = token_ids_T.device
    experts_E, picks_K = torch.arange(num_experts, device=device), torch.arange(top_k, device=device)
    block_T = token_ids_T.long().div(num_experts, rounding_mode="floor")
    place_T = token_ids_T.long().remainder(num_experts)
    # Hashed one after the other: of a sum of seed and block, layers with seeds in a row would share most orders.
    stream_T = _mix(block_T + _mix(seed))
    order_TE = _mix(stream_T.unsqueeze(1) + experts_E).argsort(dim=1, stable=True)
    return order_TE.gather(1, (place_T.unsqueeze(1) + picks_K).remainder(num_experts))


def random_assignment(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """ids_TK: K experts of each token, uniform over ordered choices of K distinct ones. Memory for T * E numbers.

    Args:
        generator: of that device; None: its default one.

    Raises:
        ConfigError: top_k is out of range.
    """
    _check_top_k(top_k, num_experts)
    # Not generator=None: dynamo cannot trace that with a dynamic size.
    given = {} if generator is None else {"generator": generator}
    draws_TE = torch.rand(num_tokens, num_experts, device=device, **given)  # type: ignore[call-overload]
    return draws_TE.topk(top_k, dim=1).indices


def uniform_assignment(
    num_tokens: int, num_experts: int, top_k: int, device: torch.device | str | None = None
) -> Tensor:
    """ids_TK = (t * K + k) mod E: the experts in turn, so that no two loads differ by more than 1.

    Raises:
        ConfigError: top_k is out of range.
    """
    _check_top_k(top_k, num_experts)
    return torch.arange(num_tokens * top_k, device=device).remainder(num_experts).view(num_tokens, top_k)
