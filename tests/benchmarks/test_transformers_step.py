"""The benchmark of transformers' training step, tiny on the CPU."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import transformers_step as bench

from dmoe.errors import ConfigError
from dmoe.models import count_parameters, get_preset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("transformers_step") / "report.json"
    arguments = ["--smoke", "--experts", "grouped_mm,dmoe,eager", "--rounds", "2", "--steps", "3"]
    assert bench.main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", bench.MODELS)
def test_every_shape_and_implementation(report, name):
    found = report["models"][name]
    assert list(found["results"]) == ["grouped_mm", "dmoe", "eager"]
    assert found["layers"] == 1
    first = found["results"]["grouped_mm"]
    assert first["ratio"] == 1.0
    for result in found["results"].values():
        assert [len(turn) for turn in result["seconds"]] == [3, 3]
        every = sorted(s for turn in result["seconds"] for s in turn)
        assert result["step_seconds"] == pytest.approx((every[2] + every[3]) / 2)
        assert result["tokens_per_second"] == pytest.approx(32 / result["step_seconds"])
        ratios = [sorted(a)[1] / sorted(b)[1] for a, b in zip(first["seconds"], result["seconds"])]
        assert result["ratio"] == pytest.approx(sum(ratios) / 2)
        assert result["first_loss"] == pytest.approx(first["first_loss"], rel=2e-3)
        assert result["first_grad_norm"] == pytest.approx(first["first_grad_norm"], rel=0.02)
        assert result["peak_gib"] > 0


@pytest.mark.parametrize("name", bench.MODELS)
def test_model_has_the_parameters_of_the_preset(name):
    config = replace(bench.shape_of(name, bench.parse([])), num_layers=2)
    assert config.hidden_size == get_preset(name).hidden_size
    model = bench.build(name, config, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config, 1)["num_params"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "most"), [("mixtral-8x7b", 4), ("olmoe-1b-7b", 12), ("qwen3-30b-a3b", 7)])
def test_layers_fit_a_card_of_80_gb(name, most):
    options = bench.parse(["--memory-gib", str(0.85 * 79.1)])
    config = bench.shape_of(name, options)
    layers = bench.layers_that_fit(config, options, CPU)
    assert 2 <= layers <= most
    limit = 0.85 * 79.1 * 2**30
    assert bench.bytes_needed(replace(config, num_layers=layers), options) <= limit
    assert bench.bytes_needed(replace(config, num_layers=layers + 1), options) > limit
    with pytest.raises(ConfigError, match=r"--memory-gib is 1\.0: must be at least"):
        bench.layers_that_fit(config, bench.parse(["--memory-gib", "1"]), CPU)


def test_wrong_numbers_and_failures_are_an_exit_code(monkeypatch, capsys):
    result = {"step_seconds": 0.5, "tokens_per_second": 2.0, "peak_gib": 1.0, "ratio": 1.0, "first_loss": 4.0}
    found = {"layers": 1, "num_active_params": 1, "num_params": 2}

    def run(difference):
        results = {"dmoe": {**result, "first_loss_difference": difference}}
        monkeypatch.setattr(bench, "measure_model", lambda *_: {**found, "results": results})
        return bench.main(["--smoke", "--models", "olmoe-1b-7b"])

    assert run(0.03) == 0
    assert run(0.05) == run(-0.05) == run(float("nan")) == 1
    assert "WRONG: first loss with dmoe: 4.00000" in capsys.readouterr().out

    def fails(*_):
        raise RuntimeError("out of something")

    monkeypatch.setattr(bench, "measure_model", fails)
    assert bench.main(["--smoke", "--models", "olmoe-1b-7b"]) == 1
    assert "olmoe-1b-7b: RuntimeError: out of something" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--models", "gpt"], ["--experts", "ours"], ["--rounds", "0"], ["--layer", "1"]])
def test_bad_requests(arguments):
    with pytest.raises(ConfigError):
        bench.main(["--smoke", *arguments])
