"""`sample_token` against distributions worked out by hand and against transformers' warpers."""

import math

import pytest
import torch

from dmoe.generate import sample_token

DRAWS = 4000


def frequencies(logits, **options):
    generator = torch.Generator().manual_seed(0)
    draws = [sample_token(logits, generator=generator, **options) for _ in range(DRAWS)]
    return torch.bincount(torch.tensor(draws), minlength=len(logits)) / DRAWS


def assert_close(measured, expected):
    """Within 5 standard deviations; what has no probability never comes."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert measured[expected == 0].sum() == 0
    bound = 5 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-9
    assert ((measured - expected).abs() <= bound).all(), (measured, expected)


LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def test_plain():
    assert_close(frequencies(LOGITS, temperature=1.0), [0.1, 0.4, 0.2, 0.3])


def test_temperature():
    # p^(1/T) normalised: T = 1/2 squares the probabilities
    squares = torch.tensor([0.01, 0.16, 0.04, 0.09])
    assert_close(frequencies(LOGITS, temperature=0.5), squares / squares.sum())


def test_top_k():
    assert_close(frequencies(LOGITS, temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7])
    assert_close(frequencies(LOGITS, temperature=1.0, top_k=1), [0, 1, 0, 0])
    assert_close(frequencies(LOGITS, temperature=1.0, top_k=100), [0.1, 0.4, 0.2, 0.3])


def test_top_p():
    assert_close(frequencies(LOGITS, temperature=1.0, top_p=0.5), [0, 4 / 7, 0, 3 / 7])  # 0.4 is not enough, 0.7 is
    assert_close(frequencies(LOGITS, temperature=1.0, top_p=0.39), [0, 1, 0, 0])
    assert_close(frequencies(LOGITS, temperature=1.0, top_p=1e-9), [0, 1, 0, 0])
    assert_close(frequencies(LOGITS, temperature=1.0, top_p=0.8), [0, 4 / 9, 2 / 9, 3 / 9])


def test_top_p_is_a_share_of_what_top_k_left():
    # after top_k 3: 4/9, 3/9, 2/9; 0.75 needs two of them (7/9). Of the full distribution it would need three.
    assert_close(frequencies(LOGITS, temperature=1.0, top_k=3, top_p=0.75), [0, 4 / 7, 0, 3 / 7])


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 5, 0.9), (1.3, 0, 0.6), (2.0, 7, 1.0)])
def test_against_transformers(temperature, top_k, top_p):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))[None] * 2
    warped = process.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        warped = process.TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = process.TopPLogitsWarper(top_p)(None, warped)
    expected = warped[0].softmax(-1).double()
    assert_close(frequencies(logits[0], temperature=temperature, top_k=top_k, top_p=top_p), expected)


def test_greedy_takes_the_largest():
    assert sample_token(torch.tensor([1.0, 3.0, 2.0])) == 1
    assert sample_token(torch.tensor([1.0, -math.inf, 1.5]), temperature=0.0, top_k=5, top_p=0.1) == 2


def test_the_generator_decides():
    draws = [
        [sample_token(LOGITS, temperature=1.0, generator=torch.Generator().manual_seed(s)) for s in range(20)]
        for _ in range(2)
    ]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1


def test_bf16_logits():
    assert_close(frequencies(torch.tensor([0.0, 0.0]).bfloat16(), temperature=1.0), [0.5, 0.5])
