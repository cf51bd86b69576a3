"""Assignments that do not look at the router: by token id, at random, in turn."""

import itertools
from collections import Counter

import pytest
import torch

from dmoe.errors import ConfigError
from dmoe.ops import hash_assignment, random_assignment, uniform_assignment

SIZES = [(8, 2), (7, 3), (5, 5), (1, 1), (60, 8)]


def hashed(token_id: int, E: int, K: int, seed: int) -> list[int]:
    """The rule for one token in Python's integers, which have no width."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B9) % 2**32
        for _ in range(2):
            x = (x ^ (x // 2**16)) * 0x45D9F3B % 2**32
        return x ^ (x // 2**16)

    block, place = divmod(token_id, E)
    stream = mix(block + mix(seed))
    order = sorted(range(E), key=lambda e: mix(stream + e))
    return [order[(place + k) % E] for k in range(K)]


@pytest.mark.parametrize(("E", "K"), SIZES)
def test_hash_against_integers_without_width(E: int, K: int) -> None:
    token_ids = torch.cat([torch.arange(-9, 90), torch.randint(0, 2**40, (50,)), torch.tensor([2**62, -(2**62)])])
    for seed in (0, 1, 12345, 2**31, 2**40 + 3):
        ids = hash_assignment(token_ids, E, K, seed)
        assert ids.dtype == torch.int64
        assert ids.tolist() == [hashed(i, E, K, seed) for i in token_ids.tolist()]
    assert torch.equal(hash_assignment(token_ids[:99].int(), E, K, 7), hash_assignment(token_ids[:99], E, K, 7))


def test_hash_does_not_change() -> None:
    """A trained model holds these numbers in its weights."""
    ids = hash_assignment(torch.tensor([0, 1, 7, 8, 50256]), 8, 2, seed=0)
    assert ids.tolist() == [[3, 5], [5, 0], [1, 3], [6, 3], [2, 0]]


@pytest.mark.parametrize(("E", "K"), SIZES)
def test_hash_is_balanced_over_ids(E: int, K: int) -> None:
    ids = hash_assignment(torch.arange(9 * E), E, K, seed=3)
    assert all(len(set(row)) == K for row in ids.tolist())
    for k in range(K):
        assert torch.bincount(ids[:, k], minlength=E).tolist() == [9] * E
        for block in ids[:, k].split(E):
            assert sorted(block.tolist()) == list(range(E))


def test_hash_spreads_pairs_over_ids_and_seeds() -> None:
    """Ordered pairs of experts of an id over seeds, of ids over blocks, and of one id in two layers: all as likely."""
    E = 6
    pairs_within = list(itertools.permutations(range(E), 2))
    seeds = torch.cat([hash_assignment(torch.tensor([17]), E, 2, seed) for seed in range(3000)])
    blocks = hash_assignment(torch.arange(3000) * E + 2, E, 2, 0)
    for ids in (seeds, blocks):
        assert_even(Counter(map(tuple, ids.tolist())), pairs_within)
    layers = [hash_assignment(torch.arange(3600), E, 1, seed) for seed in (4, 5)]
    assert_even(Counter(map(tuple, torch.cat(layers, 1).tolist())), list(itertools.product(range(E), repeat=2)))


def assert_even(counts: Counter, outcomes: list[tuple[int, ...]]) -> None:
    """Chi-square with n - 1 degrees of freedom within 5 standard deviations of its mean, or below."""
    assert set(counts) <= set(outcomes)
    expected = counts.total() / len(outcomes)
    chi2, freedom = sum((counts[o] - expected) ** 2 / expected for o in outcomes), len(outcomes) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(("E", "K"), [(4, 2), (3, 3), (5, 1), (1, 1)])
def test_random_is_uniform(E: int, K: int) -> None:
    generator = torch.Generator().manual_seed(5)
    ids = random_assignment(4000, E, K, "cpu", generator)
    assert (ids.shape, ids.dtype) == ((4000, K), torch.int64)
    counts = Counter(map(tuple, ids.tolist()))
    if E > 1:
        assert_even(counts, list(itertools.permutations(range(E), K)))
    again = random_assignment(4000, E, K, "cpu", torch.Generator().manual_seed(5))
    assert torch.equal(again, ids)
    assert E == 1 or not torch.equal(random_assignment(4000, E, K, "cpu", generator), ids)


def test_uniform_goes_round() -> None:
    assert uniform_assignment(4, 3, 2, "cpu").tolist() == [[0, 1], [2, 0], [1, 2], [0, 1]]
    for E, K in SIZES:
        ids = uniform_assignment(13, E, K, "cpu")
        assert ids.tolist() == [[(t * K + k) % E for k in range(K)] for t in range(13)]
        assert ids.dtype == torch.int64
        counts = torch.bincount(ids.flatten(), minlength=E)
        assert counts.max() - counts.min() <= 1


def test_no_tokens() -> None:
    for ids in (
        hash_assignment(torch.empty(0, dtype=torch.int64), 5, 2),
        random_assignment(0, 5, 2, "cpu"),
        uniform_assignment(0, 5, 2, "cpu"),
    ):
        assert (ids.shape, ids.dtype) == ((0, 2), torch.int64)


@pytest.mark.parametrize("K", [0, 6])
def test_top_k_out_of_range(K: int) -> None:
    for assign in (
        lambda: hash_assignment(torch.arange(3), 5, K),
        lambda: random_assignment(3, 5, K),
        lambda: uniform_assignment(3, 5, K),
    ):
        with pytest.raises(ConfigError, match=f"top_k is {K}: must be from 1 to the 5 experts"):
            assign()
