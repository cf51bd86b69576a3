"""Memory accounts of steps made by hand, whose bytes are known; and what is said when memory runs out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmoe.config import ProfilingConfig
from dmoe.errors import RunError
from dmoe.observe.memory import MemoryWatch
from dmoe.observe.memory.account import Account, account_of, following_step
from dmoe.observe.memory.accounting import MemoryTimeline
from dmoe.observe.memory.categories import (
    ACTIVATIONS,
    EXCHANGE,
    GATHERED,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    OTHER,
    TEMPORARY,
    WEIGHTS,
)
from dmoe.observe.memory.cuda_history import blocks
from dmoe.observe.memory.failure_kinds import is_out_of_memory
from dmoe.ops.regions import region

RESIZE = torch.UntypedStorage.resize_
WIDTH, ROWS, VOCAB = 100, 60, 7
MATRIX, ROW, LOGIT = 4 * WIDTH * WIDTH, 4 * ROWS * WIDTH, 4 * ROWS * VOCAB


class Square(torch.autograd.Function):
    """x squared, with a temporary of known size in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_bytes: int, backward_bytes: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backward_bytes = backward_bytes
        torch.empty(forward_bytes // 4)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        torch.empty(ctx.backward_bytes // 4)
        return torch.mul(grad, x).mul_(2), None, None


class Step:
    """Two weights with momentum; `run` is a step as `dmoe.train.step` does it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, VOCAB, bias=False))
        self.parameters = list(self.model.parameters())
        self.weights = MATRIX + 4 * WIDTH * VOCAB
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9, foreach=False)
        self.x = torch.randn(ROWS, WIDTH)

    def run(self, forward_bytes: int = 0, backward_bytes: int = 0, update_bytes: int = 0) -> None:
        with region("forward"):
            hidden = Square.apply(self.model[0](self.x), forward_bytes, backward_bytes)
            loss = self.model[1](hidden).sum()
        with region("backward"):
            loss.backward()
        with region("sync"):
            torch.empty(update_bytes // 4)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def account(self, **temporaries: int) -> Account:
        timeline = MemoryTimeline(logits_width=VOCAB)
        with timeline, following_step(timeline, self.parameters, self.optimizer):
            self.run(**temporaries)
        return account_of(timeline)


@pytest.fixture
def step() -> Step:
    made = Step()
    made.run()  # makes the momentum
    return made


def nonzero(sizes: dict[str, int]) -> dict[str, int]:
    return {category: size for category, size in sizes.items() if size}


def test_peak_in_the_forward(step: Step) -> None:
    huge = 4 * MATRIX
    account = step.account(forward_bytes=huge)
    # At the temporary: the weights, the momentum, and x W, which the square keeps.
    expected = {WEIGHTS: step.weights, OPTIMIZER: step.weights, ACTIVATIONS: ROW, TEMPORARY: huge}
    assert nonzero(account.categories) == expected
    assert nonzero(account.phases["forward"]) == expected
    assert account.peak_bytes == sum(expected.values()) == max(account.curve.totals)


def test_peak_in_the_backward_and_in_the_update(step: Step) -> None:
    huge = 4 * MATRIX
    backward = step.account(backward_bytes=huge).phases["backward"]
    # The gradient of the second matrix is there; x W and x W squared are kept by the graph, and so is the loss's 4.
    assert backward[TEMPORARY] == huge + ROW  # and the gradient that came in
    assert backward[GRADIENTS] == 4 * WIDTH * VOCAB
    assert backward[WEIGHTS] == backward[OPTIMIZER] == step.weights
    assert ROW <= backward[ACTIVATIONS] + backward[LOGITS] <= 2 * ROW + LOGIT + 4
    account = step.account(update_bytes=huge)
    update = nonzero(account.phases["optimizer"])
    expected = dict.fromkeys((WEIGHTS, GRADIENTS, OPTIMIZER), step.weights) | {TEMPORARY: huge}
    update.pop(ACTIVATIONS, None)  # the loss
    assert update == expected
    assert account.largest[GRADIENTS] == step.weights
    assert account.largest[LOGITS] == LOGIT


def test_the_rest_of_the_account(step: Step) -> None:
    account = step.account(forward_bytes=MATRIX, backward_bytes=MATRIX)
    assert account.peak_bytes == max(sum(phase.values()) for phase in account.phases.values())
    assert all(account.largest[c] >= account.categories[c] for c in account.categories)
    assert [phase for _, phase in account.curve.phases] == ["forward", "backward", "optimizer"]
    assert account.curve.seconds == sorted(account.curve.seconds)
    assert account.peak_bytes == max(account.curve.totals)


def test_storages_are_followed_when_they_are_resized_or_older() -> None:
    timeline = MemoryTimeline(device="cpu", expand={torch.ops.aten.cos.default: lambda x: torch.sin(x)})
    gathered, buffer = torch.empty(1000), torch.zeros(500)
    gathered.untyped_storage().resize_(0)
    with timeline:
        timeline.start()
        torch.cos(torch.ones(8))  # looks into an operator; what follows must still be seen
        gathered.untyped_storage().resize_(4000)
        buffer.add_(1)
        seen = timeline.at_present(since=-1)
        gathered.untyped_storage().resize_(0)
        assert timeline.at_present(since=-1)[GATHERED] == 0
    assert (seen[GATHERED], seen[OTHER]) == (4000, 2000)
    gathered.untyped_storage().resize_(4000)  # outside it hears nothing
    assert timeline.at_present(since=-1)[GATHERED] == 0


def test_blocks_of_a_snapshot_get_categories() -> None:
    def block(size: int, where: str, state: str = "active_allocated") -> dict[str, Any]:
        return {"size": size, "state": state, "frames": [{"filename": where, "line": 3, "name": "f"}] if where else []}

    made = [block(64, "x.py"), block(8, "dmoe/ops/messages.py"), block(9, "", "inactive"), block(16, "")]
    found = list(blocks({"segments": [{"address": 1000, "blocks": made}]}, {1000: WEIGHTS, 1072: GRADIENTS}))
    assert [(s.category, s.num_bytes) for s in found] == [
        (WEIGHTS, 64), (EXCHANGE, 8), ("workspaces of kernels", 16)
    ]  # fmt: skip
    assert found[1].stack == ("dmoe/ops/messages.py:3 in f",)


def watch(step: Step, folder: Path, **options: Any) -> MemoryWatch:
    profiling = ProfilingConfig(memory=True, **options)
    return MemoryWatch(
        profiling, folder, torch.device("cpu"), [step.model], step.optimizer, logits_width=VOCAB
    )  # fmt: skip


def test_watch_accounts_for_the_steps_that_were_asked_for(step: Step, tmp_path: Path) -> None:
    found = {}
    for name, every in (("once", 0), ("every second", 2)):
        tool, steps = watch(step, tmp_path / name, memory_every=every), []
        for number in range(11, 16):
            tool.begin(number)
            step.run()
            tool.end(number)
            file = tmp_path / name / "profiling" / "memory" / "summary.json"
            steps.append(json.loads(file.read_text())["step"] if file.exists() else None)
        found[name] = steps
        tool.close()
    assert found == {"once": [None, None, 13, 13, 13], "every second": [None, 12, 12, 14, 14]}
    summary = json.loads(file.read_text())
    (rank,) = summary["ranks"]
    assert rank["peak_bytes"] == sum(rank["categories"].values()) == max(size for _, size in rank["curve"])
    assert rank["categories"]["weights"] == step.weights
    assert rank["rss_bytes"] > 2**20
    assert file.with_name("memory.svg").read_text().count("backward") >= 1
    assert file.with_name("memory.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in file.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("at", [1, 2], ids=["followed", "not followed"])
def test_out_of_memory_is_explained(step: Step, tmp_path: Path, at: int) -> None:
    tool = watch(step, tmp_path)
    for number in range(1, at + 1):
        tool.begin(number)
        if number < at:
            step.run()
            tool.end(number)
    try:
        step.run(forward_bytes=2**60)  # more than there is
    except RuntimeError as caught:
        error = caught
    # What else the process has is reached too where the step was not followed.
    advice = "(weights|optimizer state) take .*dp_shard" if at == 1 else ".* take .* of .* MiB: "
    with pytest.raises(RunError, match=f"step {at}: memory ran out; {advice}") as info:
        tool.failed(error)
    tool.close()
    folder = tmp_path / "profiling" / "memory"
    report = json.loads((folder / "oom_rank0.json").read_text())
    assert "\n" not in str(info.value)
    assert report["categories"]["weights"] == report["categories"]["optimizer state"] == step.weights
    assert "memory" in report["error"]
    text = (folder / "oom_rank0.txt").read_text()
    assert "optimizer state" in text
    if at == 1:
        made_here = [b for b in report["blocks"] if any("test_memory.py" in line for line in b["stack"])]
        assert report["categories"]["activations"] == ROW
        assert [b["bytes"] for b in made_here if b["category"] == ACTIVATIONS] == [ROW]
    assert torch.UntypedStorage.resize_ is RESIZE, "afterwards nothing is followed"


def test_other_errors_are_left_alone(step: Step, tmp_path: Path) -> None:
    tool = watch(step, tmp_path)
    tool.begin(1)
    tool.failed(ValueError("something else"))
    tool.close()
    assert not list(tmp_path.rglob("oom*"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_compiled_models_are_warned_about(step: Step, tmp_path: Path) -> None:
    step.model.compile()
    with pytest.warns(UserWarning, match=r"profiling\.memory with train\.compile"):
        tool = watch(step, tmp_path, memory_every=1)
    tool.begin(1)
    tool.end(1)
    tool.close()
    (rank,) = json.loads((tmp_path / "profiling" / "memory" / "summary.json").read_text())["ranks"]
    assert nonzero(rank["categories"]) == dict.fromkeys((WEIGHTS, GRADIENTS, OPTIMIZER), step.weights)
