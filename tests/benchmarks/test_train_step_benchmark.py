"""The benchmark of a training step, tiny on the CPU: the same model on both sides, what it counts, what it survives."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import train_step

from dmoe.bench.measure import saved_bytes
from dmoe.errors import ConfigError
from dmoe.moe import moe_layers

CPU = torch.device("cpu")
H100 = 0.85 * 79.1


def options(*arguments):
    return train_step.parse(list(arguments))


def tiny(layers, **moe):
    config = train_step.model_config(options("--smoke"), layers)
    return replace(config, moe=replace(config.moe, z_loss_coef=0.0, backend="torch", **moe))


def gradients(layers, **moe):
    """Both models in fp32 from the same weights: (cross entropy, gradients by our names) of each."""
    config = tiny(layers, **moe)
    (batch,) = train_step.random_batches(1, options("--smoke"), CPU)
    ours, peer = (build(config, CPU, torch.float32) for build in (train_step.build_decoder, train_step.build_peer))
    loss = ours.loss(batch.inputs, batch.targets)
    loss.backward()
    total, peer_loss = train_step.peer_loss(peer, batch)
    total.backward()
    names = {name: name.removeprefix("model.").replace(".gate.", ".router.") for name, _ in peer.named_parameters()}
    theirs = {names[name]: parameter.grad for name, parameter in peer.named_parameters()}
    return (loss, {name: parameter.grad for name, parameter in ours.named_parameters()}), (peer_loss, theirs)


# With several layers the peer's balancing loss is one of their means, ours the mean of theirs: alike for one layer.
@pytest.mark.parametrize(("layers", "aux"), [(2, 0.0), (1, 0.5)])
def test_both_models_are_the_same(layers, aux):
    pytest.importorskip("transformers")
    (loss, ours), (peer_loss, theirs) = gradients(layers, aux_loss_coef=aux)
    torch.testing.assert_close(loss, peer_loss, rtol=1e-5, atol=0)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        error = (gradient - theirs[name]).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: {error}"


def test_the_balancing_loss_counts_in_that_test():
    """Or equal gradients would say nothing of it."""
    pytest.importorskip("transformers")
    (_, with_it), _ = gradients(1, aux_loss_coef=0.5)
    (_, without), _ = gradients(1, aux_loss_coef=0.0)
    name = "layers.0.mlp.router.weight"
    assert (with_it[name] - without[name]).norm() > 0.1 * without[name].norm()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("train_step") / "report.json"
    arguments = ["--smoke", "--compile", "off", "--peak-tflops", "0.5", "--backends", "torch,triton"]
    # Triton does not run on the CPU: one of ours that fails is reported, and is an exit code.
    assert train_step.main([*arguments, "--steps", "3", "--json", str(path)]) == 1
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
    return json.loads(path.read_text())


def test_report_has_every_variant(report):
    assert [r["name"] for r in report["results"]] == ["dmoe-torch", "dmoe-triton", "transformers"]
    assert report["results"][1]["problem"].startswith("ConfigError: expert_mlp: backend is 'triton'")
    ours, peer = report["results"][0], report["results"][2]
    for result in (ours, peer):
        assert len(result["losses"]) == 4  # one of the warm-up
        assert len(result["rounds"]) == 3
        assert result["step_seconds"] == sorted(result["rounds"])[1]
        assert result["peak_gib"] > 0
    # In bf16, from the same weights on the same tokens; and a model that knows nothing.
    assert ours["losses"][0] == pytest.approx(peer["losses"][0], rel=2e-3)
    assert ours["losses"][0] == pytest.approx(math.log(128), abs=0.2)
    assert peer["ratio"] == 1.0
    assert ours["ratio"] == pytest.approx(peer["step_seconds"] / ours["step_seconds"])


def test_mfu_is_that_of_active_parameters(report):
    # Of 8 experts a token has 2; 4 attention matrices, the router, 4 norms a layer (queries' and keys' are as wide);
    # the head and the last norm, without the embedding. Attention: 12 layers x width x sequence / 2.
    layer = 2 * 3 * 64 * 32 + 4 * 64 * 64 + 8 * 64 + 4 * 64
    flops = 6 * (2 * layer + 128 * 64 + 64) + 12 * 2 * 64 * 16 / 2
    for result in (report["results"][0], report["results"][2]):
        assert result["tokens_per_second"] == pytest.approx(2 * 16 / result["step_seconds"])
        assert result["mfu"] == pytest.approx(flops * result["tokens_per_second"] / 0.5e12)


def test_command(tmp_path):
    """As a user runs it; one variant, compiled as the trainer compiles."""
    command = [sys.executable, train_step.__file__, "--smoke", "--skip-peer", "--compile", "on"]
    done = subprocess.run([*command, "--json", str(tmp_path / "r.json")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert (result["compiled"], result["graph_breaks"], result["mfu"], result["ratio"]) == ("layers", 0, None, None)
    assert done.stdout.splitlines()[-1].startswith("dmoe-torch")


def _variant(monkeypatch, tmp_path, body, limit=30.0):
    """`run_apart` with another program in the place of a variant."""
    script = tmp_path / "variant.py"
    script.write_text(body)
    monkeypatch.setattr(train_step, "__file__", str(script))
    return train_step.run_apart([], 1, "dmoe-torch", "off", limit)


def test_crashes_and_hangs_are_reported(monkeypatch, tmp_path):
    crash = "import os, sys; print('first', file=sys.stderr); print('last words', file=sys.stderr, flush=True)\n"
    crash += "os.kill(os.getpid(), 11)"
    assert _variant(monkeypatch, tmp_path, crash) == {"problem": "ended with code -11: last words"}
    assert _variant(monkeypatch, tmp_path, "import time; time.sleep(60)", 0.5) == {"problem": "no result in 0 s"}
    assert _variant(monkeypatch, tmp_path, "print('{\"a\": 1}'); print('noise')") == {"a": 1}


def test_a_peer_that_fails_does_not_end_the_run(monkeypatch, capsys):
    good = {"step_seconds": 0.5, "rounds": [0.5], "first_step_s": 1.0, "peak_gib": 1.0, "graph_breaks": 0}
    losses = {"off": 4.8, "layers": 4.8}

    def run_apart(_arguments, _layers, name, scope, _limit):
        if (name, scope) == ("transformers", "model"):
            return {"problem": "Unsupported: a graph break"}
        return {**good, "losses": [losses[scope]]}

    monkeypatch.setattr(train_step, "run_apart", run_apart)
    assert train_step.main(["--smoke"]) == 0
    assert "transformers       model  Unsupported: a graph break" in capsys.readouterr().out
    losses["layers"] = 4.9  # another model, then
    assert train_step.main(["--smoke"]) == 1
    assert "WRONG: first losses" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_a_problem(monkeypatch):
    monkeypatch.setattr(train_step, "our_step", lambda *_: lambda _batch: float("nan"))
    with pytest.raises(RuntimeError, match="not all finite"):
        train_step.measure(options("--smoke", "--variant", "dmoe-torch", "--scope", "off"), CPU)


def test_variants_of_compile():
    def pairs(*arguments):
        return train_step.variants(options("--smoke", *arguments), CPU)

    assert pairs() == [("dmoe-torch", s) for s in ("off", "layers")] + [("transformers", s) for s in ("off", "model")]
    assert pairs("--compile", "on", "--skip-peer") == [("dmoe-torch", "layers")]
    assert pairs("--compile", "model") == [("dmoe-torch", "model"), ("transformers", "model")]
    assert [name for name, _ in train_step.variants(options("--compile", "off"), torch.device("cuda"))] == [
        "dmoe-triton", "dmoe-torch", "transformers",
    ]  # fmt: skip


def test_layers_are_cut_to_fit():
    full = train_step.model_config(options(), 16)
    assert train_step.count_parameters(full, 4096)["num_params"] == 6_919_161_856  # OLMoE-1B-7B's
    assert full.moe.aux_loss_coef == train_step.get_preset("olmoe-1b-7b").moe.aux_loss_coef

    def fit(gib, *arguments):
        return train_step.layers_that_fit(options("--memory-gib", str(gib), *arguments), CPU)

    assert fit(1000) == 16
    found = fit(H100)
    assert 8 <= found < 16
    assert fit(H100, "--micro-batch", "1") > found > fit(H100, "--micro-batch", "4")
    assert fit(H100, "--precision", "autocast") < found
    # Not less than what is certain: weights, gradients, two moments, in bf16.
    needed = train_step.bytes_needed(train_step.model_config(options(), found), options())
    assert 8 * train_step.count_parameters(replace(full, num_layers=found), 1)["num_params"] < needed <= H100 * 2**30
    with pytest.raises(ConfigError, match=r"--memory-gib is 1\.0: must be at least"):
        fit(1)


def test_estimate_of_activations():
    """Against what autograd holds: enough for both models, and not twice as much as the peer needs."""
    pytest.importorskip("transformers")
    sizes = {"hidden-size": 128, "expert-width": 64, "experts": 16, "top-k": 8, "heads": 2, "vocab-size": 64}
    sizes |= {"seq-len": 64, "micro-batch": 1}
    chosen = options(*(word for name, size in sizes.items() for word in (f"--{name}", str(size))))
    (batch,) = train_step.random_batches(1, chosen, CPU)
    held: dict[int, tuple[int, int, float]] = {}
    for layers in (1, 2):
        config = train_step.model_config(chosen, layers)
        ours, peer = (build(config, CPU, torch.bfloat16) for build in (train_step.build_decoder, train_step.build_peer))
        held[layers] = (
            saved_bytes(partial(ours.loss, batch.inputs, batch.targets), list(ours.parameters())),
            saved_bytes(lambda peer=peer: train_step.peer_loss(peer, batch)[0], list(peer.parameters())),
            train_step.bytes_needed(config, chosen) - 8 * train_step.count_parameters(config, 1)["num_params"],
        )
    of_ours, of_peer, estimate = (two - one for one, two in zip(held[1], held[2]))
    assert of_ours < of_peer <= estimate < 1.5 * of_peer
    assert held[1][1] < held[1][2]


@pytest.mark.parametrize(
    ("card", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA T4", None)],
)
def test_peak_by_name(monkeypatch, card, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: card)
    peak = train_step.peak_flops(options(), torch.device("cuda"))
    assert peak == (tflops and tflops * 1e12)
    assert train_step.peak_flops(options("--peak-tflops", "100"), torch.device("cuda")) == 1e14


def test_the_backend_asked_for_is_used(monkeypatch):
    built = []
    build = train_step.build_decoder
    monkeypatch.setattr(train_step, "build_decoder", lambda *args: built.append(build(*args)) or built[-1])
    chosen = options("--smoke", "--variant", "dmoe-reference", "--scope", "off")
    step = train_step.our_step(tiny(2), chosen, CPU)
    before = [p.clone() for p in built[0].parameters()]
    assert step(train_step.random_batches(1, chosen, CPU)[0]) == pytest.approx(math.log(128), abs=0.2)
    assert {layer.config.backend for layer in moe_layers(built[0]).values()} == {"reference"}
    assert {p.dtype for p in before} == {torch.bfloat16}
    assert all((p != old).any() for p, old in zip(built[0].parameters(), before) if p.dim() > 1)


@pytest.mark.parametrize(
    "arguments",
    [["--backends", "cuda"], ["--compile", "maybe"], ["--steps", "0"], ["--heads", "3"], ["--layers", "-1"],
     ["--memory-gib", "nan"], ["--device", "tpu"]],
)  # fmt: skip
def test_bad_requests(arguments):
    with pytest.raises(ConfigError):
        train_step.main(["--smoke", *arguments])
