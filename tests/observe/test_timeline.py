"""The timeline in one process: what marks become, what is heard of a backward, the rule, files and pictures."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dmoe.config import MoEConfig, ProfilingConfig
from dmoe.moe import MoE
from dmoe.observe.files import write_json
from dmoe.observe.timeline import StepTimeline, tool
from dmoe.observe.timeline.marks import Mark, Marks, router_backward_marked
from dmoe.observe.timeline.parts import Span, coarse, split_step
from dmoe.observe.timeline.picture import draw_timeline
from dmoe.observe.timeline.stragglers import find_stragglers
from dmoe.observe.timeline.summary import Stragglers, read_ranks, summarize
from dmoe.ops.regions import region

CPU = torch.device("cpu")


def step_of(*events: tuple[float, str]) -> tuple[list[Mark], list[float]]:
    """A step from 0: "+name" begins, "-name" ends; the last event ends the step."""
    marks = [Mark(text[1:], text[0] == "+") for _, text in events]
    return [Mark("step", True), *marks, Mark("step", False)], [10.0, *(10.0 + t for t, _ in events), 10.0 + 20]


def test_self_times_by_hand():
    marks, times = step_of(
        (1, "+data"), (3, "-data"), (4, "+forward"), (5, "+routing"), (6, "-routing"), (7, "+experts"), (9, "-experts"),
        (10, "+exchange"), (11, "+waiting"), (14, "-waiting"), (14.5, "-exchange"), (15, "-forward"),
        (16, "+waiting"), (17, "-waiting"), (18, "+sync"), (18.5, "+waiting"), (19, "-waiting"), (19, "-sync"),
    )  # fmt: skip
    parts = split_step(marks, times)
    spans = coarse(parts.spans)
    assert parts.seconds == 20
    # other: 0-1, 3-4, 15-16, 16-17 (waiting), 17-18, 19-20
    assert parts.regions == {
        "other": 6, "data": 2, "forward": 1 + 1 + 1 + 0.5, "routing": 1, "experts": 2, "exchange": 4.5, "sync": 1
    }  # fmt: skip
    assert parts.waiting == {"exchange": 3, "other": 1, "sync": 0.5}
    assert sum(parts.regions.values()) == parts.seconds
    assert spans[0] == Span("other", False, 0, 1)
    assert Span("exchange", True, 11, 14) in [span._replace(start=round(span.start, 9)) for span in spans]
    for kind in (spans, parts.spans):
        assert [a.end for a in kind[:-1]] == [b.start for b in kind[1:]]
        assert kind[-1].end == pytest.approx(20)


def test_region_in_itself_and_region_that_was_never_left():
    marks, times = step_of((1, "+experts"), (2, "+experts"), (4, "-experts"), (5, "-experts"))
    assert split_step(marks, times).regions == {"other": 16, "experts": 4}
    marks, times = step_of((1, "+forward"), (2, "+experts"), (4, "-forward"), (5, "-experts"))
    assert split_step(marks, times).regions == {"other": 17, "forward": 1, "experts": 2}
    marks, times = step_of((1, "+forward"))
    assert split_step(marks, times).regions == {"other": 1, "forward": 19}


def test_step_without_time_or_regions():
    parts = split_step([Mark("step", True), Mark("step", False)], [5.0, 5.0])
    assert parts.seconds == 0
    assert parts.regions == {"other": 0}
    assert len(coarse(parts.spans)) == 1
    assert coarse(split_step([Mark("step", True), Mark("step", False)], [5.0, 6.0]).spans) == [
        Span("other", False, 0, 1)
    ]


def test_spans_of_a_picture_are_few_and_go_to_what_fills_most_of_them():
    events = [(t, f"{sign}{name}") for i in range(2000) for t, sign, name in [
        (0.01 * i + 0.001, "+", "experts"), (0.01 * i + 0.008, "-", "experts"),
    ]]  # fmt: skip
    spans = coarse(split_step(*step_of(*events)).spans)
    assert spans == [Span("experts", False, 0, pytest.approx(20))]


class Heard:
    def __init__(self):
        self.log = []

    def enter(self, name):
        self.log.append((name, time.perf_counter()))

    def leave(self, name):
        self.log.append((f"-{name}", time.perf_counter()))


def layer(**options) -> MoE:
    return MoE(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=5, top_k=2, aux_loss_coef=0.1, **options))


@pytest.mark.parametrize("options", [{}, {"routing": "expert_choice", "aux_loss_coef": 0.0}, {"routing": "hash"}])
def test_router_backward_is_heard_and_changes_nothing(options: dict):
    torch.manual_seed(0)
    options = {"aux_loss_coef": 0.1} | options
    moe = MoE(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=5, top_k=2, **options))
    x, ids = torch.randn(7, 8), torch.arange(7)

    def gradients() -> list[torch.Tensor]:
        moe.zero_grad()
        moe(x, token_ids=ids).pow(2).sum().backward()
        return [p.grad.clone() for p in moe.parameters()]

    plain, heard = gradients(), Heard()
    with router_backward_marked(moe, heard):
        marked = gradients()
    names = [name for name, _ in heard.log]
    assert names[::2] == ["routing"] * (len(names) // 2)
    assert names[1::2] == ["-routing"] * (len(names) // 2)
    assert len(names) >= 2
    assert all(torch.equal(a, b) for a, b in zip(plain, marked))
    heard.log.clear()
    gradients()
    assert heard.log == []


def test_frozen_router_is_silent():
    moe = layer()
    moe.router.requires_grad_(False)
    heard = Heard()
    with router_backward_marked(moe, heard):
        moe(torch.randn(3, 8)).sum().backward()
    assert heard.log == []


def busy(**regions: list[list[float]]) -> dict[str, np.ndarray]:
    return {name: np.array(values) / 1e3 for name, values in regions.items()}


def test_rule_by_hand():
    """Milliseconds; ranks by steps. Rank 2 is 20 ms behind in experts in three of four steps."""
    parts = busy(
        experts=[[10] * 4, [11] * 4, [31, 30, 11, 29], [9] * 4],
        forward=[[50] * 4, [49] * 4, [50] * 4, [51] * 4],
    )
    seconds = np.full((4, 4), 0.1)
    (late,) = find_stragglers([7, 8, 9, 10], seconds, parts)
    assert (late.rank, late.region) == (2, "experts")
    # The median of the others is 60 in each step.
    assert late.seconds_behind == pytest.approx({7: 0.021, 8: 0.020, 10: 0.019})


def test_nobody_is_named_without_reason():
    even = busy(forward=[[50, 60, 55, 52], [52, 58, 56, 51]])
    seconds = np.full((2, 4), 0.1)
    assert find_stragglers([1, 2, 3, 4], seconds, even) == []
    once = busy(forward=[[50, 50, 50, 50], [50, 150, 50, 50]])
    assert find_stragglers([1, 2, 3, 4], seconds, once) == []
    by_turns = busy(forward=[[50, 90, 50, 90], [90, 50, 90, 50]])
    assert find_stragglers([1, 2, 3, 4], seconds, by_turns) == []
    little = busy(forward=[[50] * 4, [58] * 4])  # 8 of 100 ms
    assert find_stragglers([1, 2, 3, 4], seconds, little) == []
    short = busy(forward=[[1] * 4, [5] * 4])  # 4 of 5 ms, but 4 ms
    assert find_stragglers([1, 2, 3, 4], np.full((2, 4), 0.005), short) == []
    far = busy(forward=[[50] * 2, [150] * 2])
    assert find_stragglers([1, 2], np.full((2, 2), 0.2), far) == []  # two steps
    assert find_stragglers([1, 2, 3, 4], np.full((1, 4), 0.2), busy(forward=[[50] * 4])) == []  # one rank


def test_two_of_four_are_both_named():
    parts = busy(data=[[1] * 3, [41] * 3, [1] * 3, [61] * 3], forward=[[10] * 3] * 4)
    found = find_stragglers([1, 2, 3], np.full((4, 3), 0.08), parts)
    assert [(late.rank, late.region) for late in found] == [(1, "data"), (3, "data")]


def rank_file(folder: Path, rank: int, steps: range, forward: float, waits: float, **extra: object) -> None:
    n = len(steps)
    spans = {step: [["forward", False, 0, forward], ["sync", True, forward, forward + waits]] for step in steps}
    write_json(
        folder / f"rank{rank}.json",
        {
            "rank": rank, "device": "cpu", "first": 1, "closed": True, "steps": list(steps),
            "seconds": [forward + waits] * n, "regions": {"forward": [forward] * n, "sync": [waits] * n},
            "waiting": {"sync": [waits] * n}, "spans": spans, **extra,
        },
    )  # fmt: skip


def test_summary_of_files_that_do_not_have_the_same_steps(tmp_path):
    rank_file(tmp_path, 0, range(1, 9), 0.02, 0.08)
    rank_file(tmp_path, 2, range(1, 7), 0.09, 0.01)
    files = read_ranks(tmp_path, range(3))
    found = Stragglers()
    assert [(s["rank"], s["region"]) for s in found.look(files)] == [(2, "forward")]
    assert found.look(files) == []  # said once
    summary = summarize(files, found.entries(), 3)
    assert summary is not None
    assert (summary["ranks"], summary["rank_ids"], summary["missing"], summary["steps"]) == (2, [0, 2], [1], [2, 6])
    assert summary["regions"]["forward"] == pytest.approx([0.02, 0.09])
    assert summary["waiting"] == pytest.approx([0.08, 0.01])
    assert summary["step_seconds"] == pytest.approx([0.1, 0.1])
    assert summary["stragglers"] == [
        {"rank": 2, "seconds_behind": pytest.approx(0.07), "region": "forward", "steps": 5}
    ]
    assert summarize([], [], 3) is None
    rank_file(tmp_path, 1, range(20, 22), 0.02, 0.08)  # no step in common
    assert summarize(read_ranks(tmp_path, range(3)), [], 3) is None


def test_pictures_of_one_rank_and_of_many(tmp_path):
    for num_ranks in (1, 40):
        for rank in range(num_ranks):
            rank_file(tmp_path, rank, range(1, 9), 0.02 + 0.05 * (rank == 33), 0.08)
        files = read_ranks(tmp_path, range(num_ranks))
        found = Stragglers()
        found.look(files)
        draw_timeline(tmp_path, summarize(files, found.entries(), num_ranks), files)
        svg = (tmp_path / "timeline.svg").read_text()
        assert ("Rank 33" in svg) == (num_ranks == 40)
        assert svg.count(">rank ") == 2 * min(num_ranks, 16)
        assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def timeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StepTimeline:
    monkeypatch.setattr("dmoe.observe.timeline.picture.draw_timeline", lambda *_: None)
    return StepTimeline(ProfilingConfig(timeline=True), tmp_path, CPU, [layer()])


def run(watch: StepTimeline, steps: range) -> None:
    for step in steps:
        watch.begin(step)
        with region("data"):
            time.sleep(0.002)
        watch.end(step)
        with region("data"):  # between steps, as a validation is
            time.sleep(0.004)


def test_tool_in_one_process(tmp_path, monkeypatch):
    watch = StepTimeline(ProfilingConfig(timeline=True), tmp_path, CPU, [layer()])
    run(watch, range(5, 9))
    watch.close()
    folder = tmp_path / "profiling" / "timeline"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == [6, 8]
    assert {path.name for path in folder.iterdir()} == {"rank0.json", "summary.json", "timeline.svg", "timeline.png"}
    assert summary["regions"]["data"][0] >= 0.002
    assert sum(v[0] for v in summary["regions"].values()) == pytest.approx(summary["step_seconds"][0], rel=1e-3)
    assert summary["stragglers"] == []
    assert json.loads((folder / "rank0.json").read_text())["steps"] == [5, 6, 7, 8]
    timeline(tmp_path, monkeypatch)  # a process that continues must not be taken for this one
    assert not (folder / "rank0.json").exists()


def test_run_that_fails_within_a_step_leaves_the_others(tmp_path, monkeypatch):
    waits = torch.distributed.Work.wait
    watch = timeline(tmp_path, monkeypatch)
    run(watch, range(1, 4))
    watch.begin(4)
    assert torch.distributed.Work.wait is not waits
    watch.close()
    assert torch.distributed.Work.wait is waits
    assert json.loads((tmp_path / "profiling/timeline/summary.json").read_text())["steps"] == [2, 3]


def test_nothing_to_write(tmp_path, monkeypatch):
    timeline(tmp_path, monkeypatch).close()
    assert list((tmp_path / "profiling" / "timeline").iterdir()) == []


def test_files_of_other_ranks_are_waited_for_and_the_straggler_is_printed(tmp_path, monkeypatch, capsys):
    watch = timeline(tmp_path, monkeypatch)
    watch.num_ranks = 2
    run(watch, range(1, 9))
    late = threading.Timer(0.5, rank_file, (tmp_path / "profiling" / "timeline", 1, range(1, 9), 0.2, 0.0))
    late.start()
    watch.close()
    summary = json.loads((tmp_path / "profiling/timeline/summary.json").read_text())
    assert summary["missing"] == []
    assert [(s["rank"], s["region"]) for s in summary["stragglers"]] == [(1, "forward")]
    assert "timeline: rank 1 keeps the other ranks waiting, 19" in capsys.readouterr().err


def test_rank_that_died_is_not_waited_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "PATIENCE", 0.2)
    watch = timeline(tmp_path, monkeypatch)
    watch.num_ranks = 2
    run(watch, range(1, 5))
    watch.close()
    assert json.loads((tmp_path / "profiling/timeline/summary.json").read_text())["missing"] == [1]


def test_steps_in_memory_and_in_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "KEPT_STEPS", 5)
    monkeypatch.setattr(tool, "WINDOW", 4)
    watch = timeline(tmp_path, monkeypatch)
    path = tmp_path / "profiling/timeline/rank0.json"
    run(watch, range(1, 4))
    assert not path.exists()
    run(watch, range(4, 12))
    assert json.loads(path.read_text())["steps"] == [4, 5, 6, 7, 8]
    watch.close()
    assert json.loads(path.read_text())["steps"] == [7, 8, 9, 10, 11]


def test_threads_that_are_not_of_the_step_are_not_heard():
    marks, heard = Marks(CPU), []
    thread = threading.Thread(target=lambda: heard.append(marks.is_of_step()))
    thread.start()
    thread.join()
    assert heard == [False]
    assert marks.is_of_step()


class FakeEvent:
    """An event of a device that has come as far as `now`."""

    now = 0.0
    clock = 0.0

    def record(self, _stream) -> None:
        FakeEvent.clock += 1.0
        self.at = FakeEvent.clock

    def query(self) -> bool:
        return FakeEvent.now >= self.at

    def elapsed_time(self, other) -> float:
        assert self.query()
        assert other.query(), "read before it was done"
        return other.at - self.at


def test_device_times_are_read_when_they_are_there(tmp_path, monkeypatch):
    """With the events of a fake device, whose marks are 1 ms apart, and which lags behind the host by a step."""
    FakeEvent.now = FakeEvent.clock = 0.0
    made = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "stream")
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: made.append(0) or FakeEvent())
    monkeypatch.setattr("dmoe.observe.timeline.picture.draw_timeline", lambda *_: None)
    watch = StepTimeline(ProfilingConfig(timeline=True), tmp_path, torch.device("cuda"), [])
    for step in range(1, 6):
        before = FakeEvent.clock
        run(watch, range(step, step + 1))
        FakeEvent.now = before
    watch.close()
    content = json.loads((tmp_path / "profiling/timeline/rank0.json").read_text())
    assert content["steps"] == [1, 2, 3, 4]  # the last was not done
    assert content["seconds"] == pytest.approx([0.003] * 4)
    assert content["regions"] == {"other": pytest.approx([0.002] * 4), "data": pytest.approx([0.001] * 4)}
    assert min(content["host_regions"]["data"]) >= 0.002
    assert len(made) <= 12  # events of steps that are done are used again
