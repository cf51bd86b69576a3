"""The benchmarks of one layer and of grouped products, tiny on the CPU: what they count, and what they survive."""

import contextlib
import json
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import grouped_products
import moe_layer
import moe_peers

from dmoe.bench.alternatives import grouped_mm
from dmoe.bench.contest import Contestant
from dmoe.bench.error import NAMES, relative_errors
from dmoe.bench.inputs import LAYERS, ROUTINGS, Shape, expert_weights, make_inputs
from dmoe.bench.limits import BalancedProducts
from dmoe.bench.measure import TimeLimit, attempt, saved_bytes, time_limit
from dmoe.errors import ConfigError
from dmoe.ops import expert_mlp

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 64, 32, 8, 2, 64)


def run(tmp_path, *arguments, code=0):
    """The command's report."""
    path = tmp_path / "report.json"
    assert moe_layer.main(["--device", "cpu", "--quick", "--json", str(path), *arguments]) == code
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe_layer")
    plot = folder / "deep" / "plot.png"
    result = run(folder, "--skip", "grouped_mm-compiled", "--routing", "uniform,one", "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    return result


def test_report_has_every_implementation(report):
    wanted = set(moe_peers.builders(CPU)) - {"grouped_mm-compiled"}
    present = set(report["layers"][0]["results"])
    assert present | set(report["left_out"]) == wanted
    assert present >= {"dmoe-torch", "grouped_mm", "dense", "bmm"}
    assert not present & set(report["left_out"])
    for entry in (*report["layers"], *report["decode"], *report["errors"]):
        assert [result["problems"] for result in entry["results"].values() if result["problems"]] == []
    assert [entry["routing"] for entry in report["layers"]] == ["uniform", "one"]


def test_report_counts_flops_and_ratios(report):
    for entry in report["layers"]:
        # 2 FLOPs, three products (gate, up, down) of 64 x 32 for each of 2 picks of 64 tokens; the backward twice that.
        assert entry["flops"] == {"forward": 2 * 3 * 64 * 32 * 2 * 64, "forward_backward": 3 * 2 * 3 * 64 * 32 * 2 * 64}
        for kind, flops in entry["flops"].items():
            limit = entry["results"]["bmm"][kind]["seconds"]
            for result in entry["results"].values():
                figures = result[kind]
                assert len(figures["rounds"]) == 2
                assert figures["tflops"] == pytest.approx(flops / figures["seconds"] / 1e12)
                assert figures["percent_of_bmm"] == pytest.approx(100 * limit / figures["seconds"])


def test_report_has_memory_decode_and_errors(report):
    results = report["layers"][0]["results"]
    assert results["grouped_mm"]["saved_bytes"] > results["dmoe-torch"]["saved_bytes"] > 0
    assert results["bmm"]["saved_bytes"] is None
    decode = report["decode"][0]
    one_expert = 3 * 64 * 32 * 2
    assert decode["active_bytes"]["1"] == 2 * one_expert  # two picks of one token are two experts
    assert set(decode["results"]) >= {"dmoe-torch", "grouped_mm"}
    assert "bmm" not in decode["results"]
    figures = decode["results"]["dmoe-torch"]["1"]
    assert figures["gigabytes_per_second"] == pytest.approx(2 * one_expert / figures["seconds"] / 1e9)
    for entry in report["errors"]:
        for result in entry["results"].values():
            assert all(1e-4 < error < 0.02 for error in result["errors"].values())


def test_compiled_grouped_mm(tmp_path):
    report = run(tmp_path, "--only", "grouped_mm-compiled,grouped_mm", "--kinds", "forward,error")
    results = report["layers"][0]["results"]
    assert results["grouped_mm-compiled"]["first_call_s"] > results["grouped_mm"]["first_call_s"]
    assert results["grouped_mm-compiled"]["forward"]["seconds"] > 0
    assert max(report["errors"][0]["results"]["grouped_mm-compiled"]["errors"].values()) < 0.02


class _Peer:
    """grouped_mm that misbehaves at its nth call."""

    def __init__(self, name, at=0, error=None, sleep=0.0, factor=1.0):
        self.name, self.at, self.error, self.sleep, self.factor, self.calls = name, at, error, sleep, factor, 0

    def __call__(self, _shape, gate_up, down):
        def call(x, ids, weights):
            self.calls += 1
            if self.calls > self.at:
                time.sleep(self.sleep)
                if self.error:
                    raise self.error
            return self.factor * grouped_mm(x, ids, weights, gate_up, down)

        return Contestant(self.name, call, (gate_up, down))


def _with(monkeypatch, **peers):
    available = {name: moe_peers.builders(CPU)[name] for name in ("dmoe-torch", "grouped_mm", "bmm")}
    monkeypatch.setattr(moe_layer, "builders", lambda _device: available | peers)


def test_failing_peers_are_reported_and_not_fatal(tmp_path, monkeypatch, capsys):
    def absent(*_):
        raise moe_peers.Absent("not installed (nowhere)")

    full, bug = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ValueError("no such\nlayout")
    _with(
        monkeypatch, full=_Peer("full", error=full), later=_Peer("later", at=2, error=full),
        bug=_Peer("bug", error=bug), absent=absent, slow=_Peer("slow", sleep=3.0), wrong=_Peer("wrong", factor=1.2),
    )  # fmt: skip
    report = run(tmp_path, "--first-call-limit", "0.5", "--kinds", "error,forward,memory,decode")
    output = capsys.readouterr().out
    assert report["left_out"]["absent"] == "not installed (nowhere)"
    assert report["left_out"]["slow"].startswith("no result in")
    results = report["layers"][0]["results"]
    assert results["slow"]["problems"]["forward"].startswith("no result in")
    assert "slow" not in report["errors"][0]["results"]  # it was not waited for again
    assert results["full"]["problems"]["forward"] == "out of memory"
    assert results["later"]["problems"]["forward"] == "out of memory"
    assert results["later"]["saved_bytes"] > 0  # what it did before stands
    assert results["bug"]["problems"]["forward"] == "ValueError: no such layout"
    assert report["decode"][0]["results"]["full"]["problems"]["decode 1"] == "out of memory"
    for name in ("dmoe-torch", "grouped_mm", "bmm", "wrong"):
        assert len(results[name]["forward"]["rounds"]) == 2
    table = [line for line in output.splitlines() if line.startswith("full")]
    assert len(table) == 3
    assert all("out of memory" in line for line in table)
    assert "bug, forward" in output
    assert next(line for line in output.splitlines() if "WRONG RESULT" in line).startswith("wrong")


def test_wrong_result_of_ours_is_an_exit_code(tmp_path, monkeypatch):
    _with(monkeypatch, **{"dmoe-new": _Peer("dmoe-new", factor=float("nan"))})
    run(tmp_path, "--kinds", "error", code=1)


def test_time_limit_keeps_what_there_is(tmp_path, monkeypatch):
    _with(monkeypatch, slow=_Peer("slow", sleep=0.02))
    start = time.monotonic()
    report = run(tmp_path, "--time-limit", "1.5", "--rounds", "100000", "--kinds", "forward")
    assert time.monotonic() - start < 20
    assert "time limit" in report["stopped"]
    assert 0 < len(report["layers"][0]["results"]["slow"]["forward"]["rounds"]) < 100000


@pytest.mark.parametrize(
    "arguments",
    [["--shape", "gpt-9"], ["--shape", "8/8/2/3"], ["--tokens", "0"], ["--routing", "both"], ["--only", "nobody"],
     ["--rounds", "0"], ["--kinds", "sideways"]],
)  # fmt: skip
def test_bad_requests(arguments):
    with pytest.raises(ConfigError):
        moe_layer.main(["--device", "cpu", *arguments])


def test_saved_bytes_counts_storages_once():
    x = torch.randn(10, 4, requires_grad=True)

    def function():
        y = x.exp()  # saves its result: 160 bytes
        left, right = y.split(5)
        return (left * right).sin()  # saves two views of it, and the product: 80 bytes

    assert saved_bytes(function, [x]) == 160 + 80
    assert saved_bytes(lambda: x.exp(), [x]) == 0  # the output itself
    assert saved_bytes(lambda: x.sin() + 1, []) == 160  # x, if it is not known


def test_saved_bytes_leaves_no_tensor_alive():
    results = []

    def function():
        y = torch.randn(10, requires_grad=True).exp()  # its node saves it
        results.append(weakref.ref(y))
        return y.sin()

    saved_bytes(function, [])
    assert results[0]() is None


def test_saved_bytes_of_ours_is_the_pre_activation():
    gate_up, down = expert_weights(SHAPE, torch.float32, CPU)
    x, ids, weights, _ = make_inputs(SHAPE, "uniform", torch.float32, CPU)
    saved = saved_bytes(
        lambda: expert_mlp(x, ids, weights, gate_up, down, backend="torch"), [x, ids, weights, gate_up, down]
    )
    rows = 64 * 2
    assert saved == rows * 64 * 4 + 2 * rows * 8 + 8 * 4  # H [R, 2F], two permutations in int64, offsets in int32


def test_bmm_limit_does_all_products(monkeypatch):
    gate_up, down = expert_weights(SHAPE, torch.bfloat16, CPU)
    products, bmm, flops = BalancedProducts(SHAPE, gate_up, down), torch.bmm, []

    def counted(left, right, *, out):
        assert left.abs().sum() > 0
        assert right.abs().sum() > 0
        flops.append(2 * left.numel() * right.shape[2])
        return bmm(left, right, out=out)

    monkeypatch.setattr(torch, "bmm", counted)
    for kind in ("forward", "forward_backward"):
        flops.clear()
        getattr(products, kind)()
        assert sum(flops) == SHAPE.flops(kind)
    with pytest.raises(ValueError, match="do not divide"):
        BalancedProducts(replace(SHAPE, tokens=65), gate_up, down)


def test_relative_errors_are_those_planted():
    gate_up, down = expert_weights(SHAPE, torch.float32, CPU)
    inputs = make_inputs(SHAPE, "one", torch.float32, CPU)  # experts without rows must count too

    def call(x, ids, weights):
        return 1.25 * expert_mlp(x, ids, weights, gate_up, down, backend="reference")

    right = Contestant("right", lambda *a: call(*a) / 1.25, (gate_up, down))
    assert max(relative_errors(right, inputs, gate_up, down).values()) < 1e-5
    errors = relative_errors(Contestant("scaled", call, (gate_up, down)), inputs, gate_up, down)
    assert errors == pytest.approx(dict.fromkeys(NAMES, 0.25), abs=1e-5)
    mixed = replace(right, weight_gradients=lambda grads: (2 * grads[0], torch.zeros_like(grads[1])))
    errors = relative_errors(mixed, inputs, gate_up, down)
    assert errors["grad_gate_up"] == pytest.approx(1.0, abs=1e-4)
    assert errors["grad_down"] == 1.0
    assert errors["grad_x"] < 1e-5


def test_megablocks_layout_of_gradients_is_undone():
    """The only peer whose weights are converted; its builder is run with a stand-in for the library."""
    gate_up, down = expert_weights(SHAPE, torch.float32, CPU)
    D, F_, E = 64, 32, 8

    class Layer(torch.nn.Module):
        def __init__(self, _arguments):
            super().__init__()
            self.mlp = torch.nn.Module()

        def forward(self, x, _scores, weights, ids):
            gate, up, out = (w.view(E, F_, D) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
            hidden = F.silu(torch.einsum("td,efd->tef", x, gate)) * torch.einsum("td,efd->tef", x, up)
            every = torch.einsum("tef,efd->ted", hidden, out)
            return (every.gather(1, ids.unsqueeze(-1).expand(-1, -1, D)) * weights.unsqueeze(-1)).sum(1)

    class Library:
        ParallelDroplessMLP = Layer

        @staticmethod
        def Arguments(**_):
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_peers, "_library", lambda _name: Library)
        contestant = moe_peers.builders(CPU)["megablocks"](SHAPE, gate_up, down)
    inputs = make_inputs(SHAPE, "skewed", torch.float32, CPU)
    assert max(relative_errors(contestant, inputs, gate_up, down).values()) < 1e-5


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing):
    shape = Shape("wide", 8, 8, 32, 4, 2000)
    inputs = make_inputs(shape, routing, torch.float32, CPU)
    assert all(len(set(row)) == 4 for row in inputs.ids_TK.tolist())
    torch.testing.assert_close(inputs.weights_TK.sum(1), torch.ones(2000))
    assert (inputs.x_TD.abs().sum(1) > 0).all()
    shares = inputs.ids_TK.flatten().bincount(minlength=32) / 2000
    if routing == "uniform":
        assert shares.max() < 2 * shares.min()
    elif routing == "skewed":
        # A token's first draw is expert i with probability 1 / (i + 1) / H_32; four draws make each likelier.
        harmonic = sum(1 / i for i in range(1, 33))
        assert shares[0] > 2 / harmonic
        assert shares[0] > shares[1] > shares[4] > shares[31] > 0
    else:
        assert shares.tolist() == [1.0] * 4 + [0.0] * 28


def test_a_time_limit_is_not_swallowed():
    def stubborn():
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                time.sleep(0.01)

    start = time.monotonic()
    with pytest.raises(TimeLimit), time_limit(0.2):
        stubborn()
    assert attempt(stubborn, 0.2)[1].startswith("no result in")
    assert time.monotonic() - start < 10
    assert attempt(lambda: 3, 5.0) == (3, None)


def test_published_layers():
    assert LAYERS["mixtral-8x7b"] == (4096, 14336, 8, 2)
    # 23.09 TFLOP for a forward of 32768 tokens, as in the model's own arithmetic: 2 experts, 3 x 4096 x 14336 weights.
    assert Shape("mixtral", *LAYERS["mixtral-8x7b"], 32768).forward_flops() == 2 * 32768 * 2 * 3 * 4096 * 14336


@pytest.mark.parametrize("storage", ["ours", "megablocks"])
def test_the_18_problems(storage):
    problems = grouped_products.problems(storage=storage)
    assert len(problems) == 18
    assert {(p.rows, p.num_experts, min(p.width_in, p.width_out), max(p.width_in, p.width_out)) for p in problems} == {
        (65536, 64, 512, 2048), (32768, 64, 768, 3072), (8192, 64, 1024, 4096),
    }  # fmt: skip
    assert all(p.rows % p.num_experts == 0 for p in problems)
    assert {p.flops for p in problems if p.model == "XS"} == {2.0 * 65536 * 512 * 2048}
    first, second = (next(p for p in problems if (p.layer, p.product) == (n, "forward")) for n in (0, 1))
    assert (first.width_in, first.width_out) == (512, 2048) == (second.width_out, second.width_in)
    assert first.weight_shape == (64, 2048, 512)
    assert second.weight_shape == ((64, 512, 2048) if storage == "ours" else (64, 2048, 512))


@pytest.mark.parametrize("storage", ["ours", "megablocks"])
@pytest.mark.parametrize("name", ["bmm", "grouped_mm"])
def test_grouped_products_are_those_of_a_layer(storage, name):
    """Against autograd of a loop over experts in fp64."""
    for problem in grouped_products.problems({"tiny": (32, 16)}, 4, storage):
        offsets = torch.arange(8, 33, 8, dtype=torch.int32)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, problem.width_in, generator=generator).bfloat16()
        dy = torch.randn(32, problem.width_out, generator=generator).bfloat16()
        weight = torch.randn(problem.weight_shape, generator=generator).bfloat16()
        exact_x, exact_w = x.double().requires_grad_(), weight.double().requires_grad_()
        y = torch.cat([
            rows @ (w.T if problem.out_first else w) for rows, w in zip(exact_x.split(8), exact_w.unbind())
        ])  # fmt: skip
        grad_x, grad_w = torch.autograd.grad(y, [exact_x, exact_w], dy.double())
        expected = {"forward": y, "grad_x": grad_x, "grad_w": grad_w}[problem.product]
        operands = {
            "forward": (x, weight), "grad_x": (dy, weight), "grad_w": (dy, x) if problem.out_first else (x, dy),
        }[problem.product]  # fmt: skip
        assert [tuple(t.shape) for t in operands] == [tuple(t.shape) for t in problem.operands(CPU)]
        got = grouped_products.IMPLEMENTATIONS[name](problem, offsets)(*operands)
        torch.testing.assert_close(got.reshape(expected.shape).double(), expected.detach(), rtol=1e-2, atol=0.1)


def test_grouped_products_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / "products.json"
    arguments = ["--device", "cpu", "--quick", "--rounds", "2", "--json", str(path)]
    assert grouped_products.main(arguments) == 0
    report = json.loads(path.read_text())
    assert len(report["problems"]) == 18
    percents = []
    for entry in report["problems"]:
        limit, got = entry["results"]["bmm"], entry["results"]["grouped_mm"]
        assert got["percent_of_bmm"] == pytest.approx(100 * limit["seconds"] / got["seconds"])
        percents.append(got["percent_of_bmm"])
    assert report["mean_percent"]["grouped_mm"] == pytest.approx(sum(percents) / 18)
    assert "mean of 18 problems" in capsys.readouterr().out

    def wrong(problem, offsets):
        return lambda left, right: 1.1 * grouped_products.grouped_mm(problem, offsets)(left, right)

    def broken(problem, offsets):
        raise torch.OutOfMemoryError("CUDA out of memory")

    implementations = {"wrong": wrong, "broken": broken, "bmm": grouped_products.bmm}
    monkeypatch.setattr(grouped_products, "IMPLEMENTATIONS", implementations)
    monkeypatch.setattr(grouped_products, "MODELS", {"XS": grouped_products.MODELS["XS"]})
    assert grouped_products.main(arguments) == 1
    output = capsys.readouterr().out
    assert output.count("WRONG") == 6
    assert output.count("out of memory") == 6
    assert "broken: mean of 6 problems not known" in output
