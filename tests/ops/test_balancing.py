"""Losses and the bias of the choice against numbers worked out by hand, loops and Hugging Face."""

import math

import pytest
import torch

from dmoe.errors import ConfigError
from dmoe.ops import (
    balancing_loss_from_sums,
    choose_topk,
    count_tokens_by_sequence,
    count_tokens_per_expert,
    expert_bias_update,
    load_balancing_loss,
    normalized_scores,
    router_entropy,
    router_scores,
    router_z_loss,
    sums_by_sequence,
)


def test_load_balancing_loss_at_perfect_balance() -> None:
    # 4 tokens, 4 experts, K = 1, token t on expert t, every probability 1/4:
    # f_e = 1/4 and P_e = 1/4, so the loss is 4 * (4 * 1/4 * 1/4) = 1.
    scores = torch.full((4, 4), 0.25)
    assert load_balancing_loss(scores, torch.tensor([1, 1, 1, 1]), 1).item() == 1.0
    # The same with K = 2: 8 picks, two on each expert; f_e = 2/8 = 1/4 again.
    assert load_balancing_loss(scores, torch.tensor([2, 2, 2, 2]), 2).item() == 1.0


def test_load_balancing_loss_with_all_tokens_on_one_expert() -> None:
    # K = 1, every token puts probability 1 on expert 2: f = P = (0, 0, 1, 0), loss = 4 * 1 * 1 = 4 = E.
    scores = torch.tensor([0.0, 0.0, 1.0, 0.0]).repeat(3, 1)
    assert load_balancing_loss(scores, torch.tensor([0, 0, 3, 0]), 1).item() == 4.0
    # K = 2, every token on experts 0 and 1 with probability 1/2 each: f = (3/6, 3/6, 0, 0) = P,
    # loss = 4 * (1/4 + 1/4) = 2 = E / K.
    scores = torch.tensor([0.5, 0.5, 0.0, 0.0]).repeat(3, 1)
    assert load_balancing_loss(scores, torch.tensor([3, 3, 0, 0]), 2).item() == 2.0


def test_load_balancing_loss_of_an_uneven_batch() -> None:
    # Three tokens, two experts, K = 1, probabilities (0.9, 0.1), (0.6, 0.4), (0.2, 0.8).
    # Argmax: experts 0, 0, 1, so f = (2/3, 1/3).
    # P_0 = (0.9 + 0.6 + 0.2) / 3 = 1.7 / 3, P_1 = (0.1 + 0.4 + 0.8) / 3 = 1.3 / 3.
    # Loss = 2 * (2/3 * 1.7/3 + 1/3 * 1.3/3) = 2 * (3.4 + 1.3) / 9 = 9.4 / 9 = 1.0444...
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], requires_grad=True)
    ids, _ = choose_topk(scores, 1, normalize=True)
    counts = count_tokens_per_expert(ids, 2)
    assert counts.tolist() == [2, 1]
    loss = load_balancing_loss(scores, counts, 1)
    assert loss.item() == pytest.approx(9.4 / 9, rel=1e-6)
    # Gradient through P alone, and through the division of each row by its sum (1 here): with c = E * f / T =
    # (4/9, 2/9) and row p, d loss / d p_e = c_e - (c . p). Row 0: c . p = 0.4 * ... = (3.6 + 0.2) / 9 = 3.8 / 9,
    # so (0.2, -1.8) / 9. Row 1: (2.4 + 0.8) / 9, so (0.8, -1.2) / 9. Row 2: (0.8 + 1.6) / 9, so (1.6, -0.4) / 9.
    loss.backward()
    want = torch.tensor([[0.2, -1.8], [0.8, -1.2], [1.6, -0.4]]) / 9
    torch.testing.assert_close(scores.grad, want, rtol=1e-5, atol=1e-7)


def test_load_balancing_loss_normalises_sigmoid_scores() -> None:
    # Rows (0.9, 0.3) and (0.2, 0.2) become (3/4, 1/4) and (1/2, 1/2): P = (5/8, 3/8). Both tokens count for expert 0:
    # f = (1, 0), loss = 2 * 5/8 = 1.25.
    scores = torch.tensor([[0.9, 0.3], [0.2, 0.2]])
    assert load_balancing_loss(scores, torch.tensor([2, 0]), 1).item() == pytest.approx(1.25, rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balancing_loss_against_hugging_face(top_k: int) -> None:
    """Hugging Face divides the counts by the tokens, not by the picks: K times ours."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(20, 5) * 2
    theirs = mixtral.load_balancing_loss_func((logits,), num_experts=5, top_k=top_k)
    scores = router_scores(logits, "softmax")
    ids, _ = choose_topk(scores, top_k, normalize=True)
    ours = load_balancing_loss(scores, count_tokens_per_expert(ids, 5), top_k)
    assert theirs.item() == pytest.approx(top_k * ours.item(), rel=1e-5)


def test_router_z_loss() -> None:
    # Row (0, 0): logsumexp = ln 2, square 0.480453. Row (ln 3, 0): ln(3 + 1) = ln 4 = 2 ln 2, square 4 * 0.480453.
    # Mean: 2.5 * (ln 2)^2 = 1.201133.
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], requires_grad=True)
    loss = router_z_loss(logits)
    assert loss.item() == pytest.approx(2.5 * math.log(2) ** 2, rel=1e-6)
    assert loss.item() == pytest.approx(1.201133, abs=1e-6)
    # d/dlogit = 2 * logsumexp * softmax / T: row 0: ln 2 * (1/2, 1/2); row 1: 2 ln 2 * (3/4, 1/4).
    loss.backward()
    want = math.log(2) * torch.tensor([[0.5, 0.5], [1.5, 0.5]])
    torch.testing.assert_close(logits.grad, want)


def test_losses_of_no_tokens_are_zero() -> None:
    empty = torch.empty(0, 4, requires_grad=True)
    total = load_balancing_loss(empty, torch.zeros(4, dtype=torch.int64), 2) + router_z_loss(empty)
    assert total.item() == 0.0
    assert router_entropy(empty).item() == 0.0
    total.backward()


def test_router_entropy() -> None:
    # Row (1/2, 1/2): ln 2. Row (1, 0): 0. Mean ln 2 / 2. Scores are normalised first: (0.1, 0.1) is (1/2, 1/2).
    assert router_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).item() == pytest.approx(math.log(2) / 2)
    assert router_entropy(torch.tensor([[0.1, 0.1], [0.7, 0.0]])).item() == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("sizes", [[13, 7], [20, 0, 3], [1, 1, 1, 1]])
def test_losses_of_parts_of_a_batch_add_up(sizes: list[int], score_function: str) -> None:
    """With the counts and number of tokens of the whole batch, each part's loss and gradient is its share."""
    whole = (torch.randn(sum(sizes), 5, dtype=torch.float64) * 2).requires_grad_()
    scores = router_scores(whole, score_function)
    counts = count_tokens_per_expert(choose_topk(scores, 2, normalize=True)[0], 5)
    want = load_balancing_loss(scores, counts, 2), router_z_loss(whole)
    for i, loss in enumerate(want):
        (want_grad,) = torch.autograd.grad(loss, whole, retain_graph=True)
        for num_tokens in (sum(sizes), torch.tensor(sum(sizes), dtype=torch.float64)):
            total, grads = 0.0, []
            for part in whole.detach().split(sizes):
                leaf = part.clone().requires_grad_()
                scores = router_scores(leaf, score_function)
                losses = load_balancing_loss(scores, counts, 2, num_tokens), router_z_loss(leaf, num_tokens)
                losses[i].backward()
                total += losses[i].item()
                grads.append(leaf.grad)
            assert total == pytest.approx(loss.item(), rel=1e-12)
            torch.testing.assert_close(torch.cat(grads), want_grad, rtol=1e-12, atol=1e-14)


def test_balancing_loss_from_sums_is_the_loss() -> None:
    scores = torch.rand(9, 4, dtype=torch.float64)
    counts = torch.tensor([3, 0, 5, 10])
    sums = normalized_scores(scores).sum(0)
    want = load_balancing_loss(scores, counts, 2)
    assert balancing_loss_from_sums(sums, counts, 2, 9).item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "sequences", "experts", "top_k"), [(12, 3, 5, 2), (4, 4, 1, 1), (0, 2, 3, 2), (0, 0, 3, 2)]
)
def test_sums_and_loss_by_sequence(tokens: int, sequences: int, experts: int, top_k: int) -> None:
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    scores = router_scores(logits, "sigmoid")
    ids = choose_topk(scores, top_k, normalize=True)[0]
    ids[::3, 0] = experts  # no expert
    probs = normalized_scores(scores)
    sums, counts = sums_by_sequence(probs, sequences), count_tokens_by_sequence(ids, experts, sequences)
    assert (sums.shape, counts.shape, counts.dtype) == ((sequences, experts), (sequences, experts), torch.int64)
    length, want = tokens // max(sequences, 1), 0.0
    for b in range(sequences):
        rows = range(b * length, (b + 1) * length)
        for e in range(experts):
            picks = sum(ids[t].tolist().count(e) for t in rows)
            total = sum(probs[t, e].item() for t in rows)
            assert counts[b, e].item() == picks
            assert sums[b, e].item() == pytest.approx(total, rel=1e-12)
            want += experts * picks / (top_k * max(length, 1)) * total / max(length, 1)
    got = balancing_loss_from_sums(sums, counts, top_k, max(length, 1))
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_sequences_that_do_not_divide_the_tokens() -> None:
    for sequences in (3, 0, 11):
        message = f"num_sequences is {sequences}: must be a divisor of the 10 tokens"
        with pytest.raises(ConfigError, match=message):
            sums_by_sequence(torch.zeros(10, 2), sequences)


def test_sums_of_values_that_are_not_contiguous() -> None:
    values = torch.rand(3, 8).t()
    assert torch.equal(sums_by_sequence(values, 2), sums_by_sequence(values.contiguous(), 2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.int32])
def test_expert_bias_update(dtype: torch.dtype) -> None:
    # Mean of the counts 10, 2, 6, 6 is 6: signs -1, +1, 0, 0. With b = (1, 0, 0, 0.5) and rate 0.1: (0.9, 0.1, 0, 0.5),
    # less their mean 0.375.
    bias = torch.tensor([1.0, 0.0, 0.0, 0.5])
    new = expert_bias_update(bias, torch.tensor([10, 2, 6, 6], dtype=dtype), 0.1)
    torch.testing.assert_close(new, torch.tensor([0.525, -0.275, -0.375, 0.125]))
    assert bias.tolist() == [1.0, 0.0, 0.0, 0.5]
    assert new.dtype == torch.float32
    # Counts above 2^24, which fp32 does not tell apart: mean 2^30 + 1/3.
    counts = torch.tensor([2**30, 2**30, 2**30 + 1])
    torch.testing.assert_close(expert_bias_update(torch.zeros(3), counts, 3.0), torch.tensor([3.0, 3.0, -3.0]) - 1.0)
    assert expert_bias_update(torch.zeros(1), torch.tensor([7]), 0.1).tolist() == [0.0]
    assert expert_bias_update(torch.zeros(3), torch.zeros(3), 0.1).tolist() == [0.0] * 3


def test_bias_updates_even_out_the_load() -> None:
    """Skewed scores, the bias updated after each batch: the loads meet."""
    generator = torch.Generator().manual_seed(0)
    bias, skew = torch.zeros(6), torch.linspace(-2, 2, 6)
    for step in range(300):
        scores = (torch.randn(256, 6, generator=generator) + skew).sigmoid()
        counts = count_tokens_per_expert(choose_topk(scores, 2, normalize=True, bias_E=bias)[0], 6)
        if step == 0:
            assert counts.max() > 5 * counts.min()
        bias = expert_bias_update(bias, counts, 0.01)
    assert counts.max() < 1.5 * counts.min()
