"""Messages of gradients that start before autograd asks for them."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from interpreted import run_interpreted

from dmoe.ops.early import EarlyGradients

CHANGES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "another tensor": lambda x, w: (x.clone(), w),
    "other weights": lambda x, w: (x, w.clone()),
    "changed in place": lambda x, w: (x.mul_(2), w),
    "a part": lambda x, w: (x[:, :3], w),
}
UNLIKE = {"padded": ((5, 8), torch.float32), "of a cast": ((5, 4), torch.float64)}


@pytest.fixture
def sent() -> list[tuple[Tensor, Tensor]]:
    return []


@pytest.fixture
def early(sent: list[tuple[Tensor, Tensor]]) -> EarlyGradients:
    def send(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        sent.append((x, w))
        return (torch.tensor(len(sent)),)

    return EarlyGradients(send, 4, torch.float32)


@pytest.mark.parametrize("rows", [0, 5])
def test_gradients_travel_once(early: EarlyGradients, sent: list[tuple[Tensor, Tensor]], rows: int) -> None:
    x, w = torch.randn(rows, 4), torch.randn(rows, 1)
    early.computed(x, w)
    assert early.messages(x.view(rows, 4), w.squeeze(1)) == (1,)
    assert len(sent) == 1
    assert early.messages(x, w) == (2,), "a second backward sends again"


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_gradients_are_sent(
    early: EarlyGradients, sent: list[tuple[Tensor, Tensor]], rows: int, change: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """On a rank without rows too, which must take part in the messages of the others."""
    x, w = torch.randn(rows, 4), torch.randn(rows, 2)
    early.computed(x, w)
    other = change(x, w)
    assert early.messages(*other) == (2,)
    assert sent[1] == other


@pytest.mark.parametrize(("shape", "dtype"), UNLIKE.values(), ids=UNLIKE)
def test_what_cannot_be_the_gradient_does_not_start(
    early: EarlyGradients, sent: list[tuple[Tensor, Tensor]], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    early.computed(torch.randn(shape), torch.randn(5, 1, dtype=dtype))
    assert not sent


def test_between_ranks() -> None:
    run_interpreted("early_ranks_cases.py")
