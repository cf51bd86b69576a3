"""Where a layer's time goes: what the command counts, and that it knows every kernel by its name."""

import ast
import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import profile_layer

from dmoe.bench.inputs import Shape, make_inputs
from dmoe.errors import ConfigError, RunError

PACKAGE = Path(__file__).parents[2] / "dmoe"
PRODUCTS = ("aten::bmm", "aten::_grouped_mm")


def run(tmp_path, *arguments):
    path = tmp_path / "deep" / "report.json"
    assert profile_layer.main(["--device", "cpu", "--quick", "--json", str(path), *arguments]) == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run(tmp_path_factory.mktemp("profile"), "--router", "--rounds", "3")


def calls(phase, *names):
    return sum(row["calls"] for row in phase["kernels"] if row["name"] in names)


def test_phases_and_their_sums(report):
    assert [(p["what"], p["kind"]) for p in report["phases"]] == [
        ("expert_mlp", "forward"), ("expert_mlp", "forward_backward"), ("MoE", "forward"), ("MoE", "forward_backward"),
    ]  # fmt: skip
    for phase in report["phases"]:
        rows, groups, total = phase["kernels"], phase["groups_ms"], phase["kernels_ms"]
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert sum(row["ms"] for row in rows) == pytest.approx(total)
        assert total > 0
        assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
        assert set(groups) == {"products", "activation", "routing", "metadata", "rows", "other"}
        assert sum(groups.values()) == pytest.approx(total)
        assert groups["products"] == pytest.approx(sum(r["ms"] for r in rows if r["group"] == "products"))
        assert phase["wall_ms"] - phase["idle_ms"] == pytest.approx(total)
        beside = groups["routing"] + groups["metadata"] + groups["rows"]
        assert phase["beside_products_share"] == pytest.approx(beside / total)


def test_calls_are_those_of_one_step(report):
    for phase in report["phases"]:
        backward = phase["kind"] == "forward_backward"
        assert calls(phase, "dmoe::expert_mlp") == 1
        assert calls(phase, "dmoe::expert_mlp_backward") == backward
        # x W1^T and a W2^T; then dy W2, dy^T a, dh W1, dh^T x.
        assert calls(phase, *PRODUCTS) == (6 if backward else 2)
        assert {row["group"] for row in phase["kernels"] if row["name"] in PRODUCTS} == {"products"}


def test_what_the_layer_adds_is_routing(report):
    experts, layer = report["phases"][0], report["phases"][2]
    assert experts["groups_ms"]["routing"] == 0
    new = {row["name"]: row["group"] for row in layer["kernels"] if not calls(experts, row["name"])}
    assert {"aten::linear", "aten::topk", "aten::_softmax"} <= set(new)
    assert set(new.values()) == {"routing"}
    assert layer["groups_ms"]["routing"] > 0


def test_host_times_of_all(report, capsys):
    assert set(report["host"]) == {"expert_mlp", "MoE", "a layer with grouped_mm", "three grouped_mm"}
    assert all(times["forward_ms"] > 0 < times["backward_ms"] for times in report["host"].values())
    assert report["left_out"] == {}


def test_products_of_another_choice_of_experts_are_no_routing(tmp_path):
    """On a CPU groups of much the same size, as this router makes them, are one batched product, and others are not."""
    report = run(tmp_path, "--router", "--routing", "one", "--rounds", "1", "--shape", "16/8/8/2")
    assert [calls(phase, "aten::_grouped_mm") for phase in report["phases"][::2]] == [2, 0]
    assert [calls(phase, "aten::bmm") for phase in report["phases"][::2]] == [0, 2]
    for phase in report["phases"]:
        assert {row["group"] for row in phase["kernels"] if row["name"] in PRODUCTS} == {"products"}


def test_what_does_not_run_is_left_out(tmp_path, monkeypatch, capsys):
    def refuses(*_, **__):
        raise RuntimeError("no kernel for\nthis device")

    monkeypatch.setattr(profile_layer.F, "grouped_mm", refuses)
    arguments = ("--shape", "16/8/4/2", "--backend", "reference", "--routing", "one", "--tokens", "8", "--rounds", "1")
    report = run(tmp_path, *arguments)
    assert report["left_out"] == dict.fromkeys(
        ["a layer with grouped_mm", "three grouped_mm"], "RuntimeError: no kernel for this device"
    )
    assert set(report["host"]) == {"expert_mlp"}
    assert [phase["what"] for phase in report["phases"]] == ["expert_mlp"] * 2
    assert calls(report["phases"][0], "dmoe::expert_mlp") == 0
    output = capsys.readouterr().out
    assert "others)" in output
    assert "left out: RuntimeError: no kernel" in output


def _is_jit(function):
    return any(ast.unparse(decorator).split("(")[0].endswith(".jit") for decorator in function.decorator_list)


def test_every_kernel_has_a_group():
    """Kernels: what is launched as `name[grid](...)`. Other compiled functions are called by these."""
    compiled, called, launched = set(), set(), set()
    for path in (PACKAGE / "ops").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and _is_jit(node):
                compiled.add(node.name)
                called |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id != node.name}
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value).split(".")[-1])
    kernels = compiled & launched
    assert compiled - called - kernels == {"_probe"}  # tells the interpreter from the compiler, and is never run
    names = Counter(name for group in profile_layer.KERNELS.values() for name in group.split())
    assert set(names) == kernels
    assert set(names.values()) == {1}
    assert set(profile_layer.PREFIXES) | {"other"} == set(profile_layer.KERNELS)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("_kernel", "activation"),
        ("_group", "metadata"),
        ("_spread_rows", "rows"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm>>(int)", "products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN", "products"),
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long>(int)", "rows"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >(int)", "other"),
        ("Memset (Device)", "other"),
        ("_kernel_of_another", "other"),
    ],
)
def test_group_of_a_name(name, group):
    assert profile_layer.group_of(name) == group


def _event(key, count, *, gpu=0, cpu=0, device=DeviceType.CUDA, named=False):
    return SimpleNamespace(
        key=key, count=count, device_type=device, is_user_annotation=named,
        self_device_time_total=gpu, self_cpu_time_total=cpu,
    )  # fmt: skip


def test_on_a_gpu_kernels_count_and_nothing_else(monkeypatch):
    """With a stand-in for the profiler: the names and the microseconds that it has for 2 steps on a GPU."""
    events = [
        _event("aten::copy_", 8, gpu=900, cpu=700, device=DeviceType.CPU),  # has the time of the kernel it launched
        _event("a range", 2, gpu=5000, named=True),
        _event("_sum_picks", 2, gpu=800),
        _event("_rows_kernel", 6, gpu=3000),
    ]
    asked, order = [], []

    class Profiler:
        def __init__(self, activities):
            asked.extend(activities)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            order.append("end")

        def key_averages(self):
            return events

    monkeypatch.setattr(profile_layer, "profile", Profiler)
    monkeypatch.setattr(profile_layer, "_synchronize", lambda device: order.append(f"wait for {device}"))
    cuda = torch.device("cuda")
    rows = profile_layer.profile_steps(lambda: order.append("step"), 2, cuda)
    assert rows == [{"name": "_rows_kernel", "calls": 3, "ms": 1.5}, {"name": "_sum_picks", "calls": 1, "ms": 0.4}]
    assert order == ["step", "step", "wait for cuda", "end"]
    assert torch.profiler.ProfilerActivity.CUDA in asked
    del events[2:]
    with pytest.raises(RunError, match="saw nothing run on cuda"):
        profile_layer.profile_steps(lambda: None, 2, cuda)


def test_time_of_a_step_is_the_median_of_runs_without_the_profiler():
    steps, seconds = [], iter([3.0, 1.0, 2.0])

    class Clock:
        def seconds(self, run):
            before = len(steps)
            run()
            assert len(steps) - before == 4
            assert not torch.autograd._profiler_enabled()
            return next(seconds)

    class Contestant:
        name = "mine"

        def forward(self, inputs):
            steps.append(torch.ones(1) + 1)

    inputs = make_inputs(Shape("tiny", 8, 8, 4, 2, 4), "uniform", torch.float32, torch.device("cpu"))
    phase = profile_layer.profile_phase(Contestant(), inputs, "forward", 4, Clock())
    assert phase["wall_ms"] == 1e3 * 2.0 / 4
    assert calls(phase, "aten::add") == 1


def test_host_times_are_medians_after_the_first_calls():
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.02)
            return grad

    count = 0

    def call():
        nonlocal count
        count += 1
        time.sleep(0.1 if count <= 3 else 0.0)
        return Slow.apply(x)

    x = torch.ones(2, requires_grad=True)
    times = profile_layer.host_times(call, [x], torch.ones(2), 3)
    assert count == 6
    assert times["forward_ms"] < 15
    assert times["backward_ms"] >= 20


@pytest.mark.parametrize(
    "arguments",
    [["--shape", "gpt-9"], ["--shape", "8/8/2/3"], ["--shape", "8/8/2/2,8/8/4/2"], ["--tokens", "0"], ["--rounds", "0"],
     ["--routing", "both"], ["--backend", "fortran"], ["--device", "tpu"], ["--rouds", "3"]],
)  # fmt: skip
def test_bad_requests(arguments):
    with pytest.raises(ConfigError):
        profile_layer.main(["--device", "cpu", *arguments])
