"""What is said about a step that was not finite, in one process, and that saying it changes nothing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from nonfinite_cases import Run, config, poison_gradient, poison_output

from dmoe.train.nonfinite import _Seen, sentences
from dmoe.train.nonfinite_trace import Event


@pytest.fixture(scope="module")
def shared() -> Run:
    return Run(config())


@pytest.fixture
def run(shared: Run) -> Run:
    shared.explainer._left = 3
    return shared


def test_weight_of_an_expert(run: Run) -> None:
    weight = run.engine.parts[0].layers[1].mlp.experts.down_proj
    with torch.no_grad():
        old = weight[2, 0, 0].item()
        weight[2, 0, 0] = math.nan
    run.step()
    with torch.no_grad():
        weight[2, 0, 0] = old
    assert run.lines[0].startswith("not finite: layers.1.mlp.experts: output has ")
    assert "all rows of expert 2, its inputs are finite" in run.lines[0]
    assert "so are all weights" not in run.lines[0]
    assert run.lines[1] == "not finite: the weight layers.1.mlp.experts.down_proj has 1 NaN of 2048 in expert 2"


def test_output_of_a_module(run: Run) -> None:
    handle = poison_output(run.module("layers.0.self_attn.o_proj"), math.inf, slice(3, 5))
    run.step()
    handle.remove()
    (line,) = run.lines
    assert line.startswith("not finite: layers.0.self_attn.o_proj: output has 64 Inf of 1024 in tokens 3, 4 of 32, ")
    assert line.endswith("its inputs are finite and so are all weights")


def test_output_of_experts_in_a_checkpointed_layer() -> None:
    run = Run(config(activation_checkpointing=True))
    poison_output(run.module("layers.1.mlp.experts"))
    run.step()
    assert len(run.lines) == 1
    assert run.lines[0].startswith("not finite: layers.1.mlp.experts: output has 32 NaN of 1024 in 1 of 32 rows,")


def test_between_modules(run: Run) -> None:
    layer = run.module("layers.1")
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0] * math.nan, *args[1:]))
    run.step()
    handle.remove()
    assert run.lines[0].startswith(
        "not finite: layers.1: its input has 1024 NaN of 1024, all outputs of modules before it"
    )


def test_gradient_of_a_module_alone(run: Run) -> None:
    undo = poison_gradient(run.module("layers.1.mlp.experts"))
    assert math.isfinite(run.step().loss)
    undo()
    assert run.lines[0].startswith(
        "not finite: backward of layers.1.mlp.experts: the gradient of its input has 1024 NaN"
    )
    assert run.lines[0].endswith("all rows of experts 0, 1, 2, 3, that of its output is finite")


def test_gradient_of_a_parameter_alone(run: Run) -> None:
    experts = run.module("layers.0.mlp.experts")
    rows = torch.tensor([1.0, 1.0, 1.0, math.nan])[:, None, None]
    handle = experts.gate_up_proj.register_hook(lambda gradient: gradient * rows)
    run.step()
    handle.remove()
    (line,) = run.lines
    assert line.startswith(
        "not finite: the gradient of layers.0.mlp.experts.gate_up_proj has 1024 NaN of 4096 in expert 3"
    )
    assert line.endswith("all that passes between modules is finite")


def test_loss_of_finite_logits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = run.engine.loss
    monkeypatch.setattr(
        run.engine, "loss", lambda logits, targets: loss(logits, targets).detach() * math.inf + logits.sum()
    )
    run.step()
    assert run.lines[0].startswith("not finite: the loss is inf, the outputs of all modules are finite, the largest ")


def test_not_seen_again(run: Run) -> None:
    calls = []

    def once(module, args, output):
        calls.append(0)
        return output * math.nan if len(calls) == 1 else output

    handle = run.module("norm").register_forward_hook(once)
    run.step()
    handle.remove()
    assert run.lines[0].startswith("not finite: everything is finite when the same batch runs again")


def test_three_are_explained_and_none_if_not_wanted() -> None:
    run, silent = Run(config()), Run(config(), explain=False)
    for each in (run, silent):
        poison_output(each.module("norm"))
    counts = []
    for step in range(5):
        run.step(step)
        silent.step(step)
        counts.append(len(run.lines))
        assert not silent.lines
    assert counts == [1, 1, 1, 0, 0]


def test_nothing_is_left_behind() -> None:
    """Weights, statistics, balancing and random numbers of the steps after it are those of a run that explains nothing;
    and random numbers of the second run are those of the first, or the bad one would not be seen again."""
    moe = {"jitter_eps": 0.1, "expert_bias_rate": 0.01, "global_aux_loss_coef": 0.05}
    runs = [Run(config(moe=moe), explain=explain) for explain in (True, False)]
    for run in runs:
        run.random = []
        run.module("layers.0.mlp.router").register_forward_hook(
            lambda m, args, output, run=run: run.random.append(output.logits_TE.detach().clone())
        )
        torch.manual_seed(5)
        for step in range(4):
            handle = poison_output(run.module("norm")) if step == 1 else None
            run.step(step)
            if handle is not None:
                handle.remove()
        run.after = torch.rand(3)
    explained, plain = runs
    for ours, theirs in zip(explained.engine.parts[0].state_dict().items(), plain.engine.parts[0].state_dict().items()):
        assert torch.equal(ours[1], theirs[1]), ours[0]
    assert explained.engine.load_summaries() == plain.engine.load_summaries()
    assert torch.equal(explained.after, plain.after)
    assert len(explained.random) == len(plain.random) + 2
    assert all(torch.equal(a, b) for a, b in zip(explained.random[2:4], explained.random[4:6]))


def test_compiled_layers_run_as_they_were_written() -> None:
    run = Run(config())
    calls = []

    def compiled(*args, **kwargs):
        calls.append(0)

    layer = run.module("layers.0")
    layer._compiled_call_impl = compiled
    poison_output(run.module("layers.0.mlp"))
    run.explainer.explain(run.batch(), run.lines.append)
    assert not calls
    assert layer._compiled_call_impl is compiled
    assert "layers.0.mlp: output has" in run.lines[0]


def seen(event: Event | None = None, weights: list[str] | None = None) -> _Seen:
    return _Seen(weights or [], event, [], 1.0, 1.0, 1.0)


def test_first_of_several_ranks() -> None:
    later, sooner = Event(False, 9, "b has NaN"), Event(False, 4, "a has NaN")
    assert sentences([seen(later), seen(sooner), seen(), seen(sooner)]) == [
        "not finite: ranks 1, 3: a has NaN and so are all weights; later also on rank 0"
    ]
    backward = Event(True, 1, "backward")
    assert sentences([seen(backward), seen(later)])[0].startswith("not finite: rank 1: b has NaN")


def test_stages() -> None:
    """What came from another stage is no beginning, and the last stage begins the backward."""
    received, own = Event(False, 1, "its input", 1, received=True), Event(False, 30, "its output", 0)
    assert sentences([seen(own), seen(received)])[0].startswith("not finite: rank 0: its output")
    assert sentences([seen(), seen(received)])[0].startswith("not finite: rank 1: its input")
    early, late = Event(True, 3, "early stage", 0), Event(True, 8, "late stage", 4)
    assert sentences([seen(early), seen(late)])[0].startswith("not finite: rank 1: late stage")
    early, late = Event(False, 8, "early stage", 0), Event(False, 3, "late stage", 4)
    assert sentences([seen(late), seen(early)])[0].startswith("not finite: rank 1: early stage")


def test_weights_of_ranks() -> None:
    bad = "the weight w has 1 NaN of 4"
    assert sentences([seen(), seen(weights=[bad])]) == [f"not finite: rank 1: {bad}"]


def test_ranks(tmp_path: Path) -> None:
    """Four ranks, of which one has something bad: with experts, FSDP and checkpointing, and in pipelines."""
    import nonfinite_worker
    from ranks import run_ranks

    run_ranks(nonfinite_worker.rank_main, (str(tmp_path),), nonfinite_worker.WORLD)
    lines = json.loads((tmp_path / "lines.json").read_text())
    begins = {
        "output": "rank 1: layers.1.mlp.experts: output has 32 NaN",
        "gradient": "rank 2: backward of layers.0.mlp.experts: the gradient of its input has",
        "first stage": "rank 1: layers.0.self_attn.o_proj: output has 32 NaN of 512 in token 0 of 16, its inputs are",
        "last stage": "ranks 2, 3: layers.1.self_attn.o_proj: output has 32 NaN",
        "gradient of the last stage": "rank 3: backward of layers.1.self_attn.o_proj: the gradient of its input has",
        "split backward": "rank 1: layers.2.mlp.experts: output has",
    }
    for case, begin in begins.items():
        if case in lines or case != "split backward":
            assert lines[case][0].startswith(f"not finite: {begin}"), lines[case]
    # Expert 3 is in the ranks with an odd number, and the bad shard in one of them.
    assert "layers.1.mlp.experts: output has" in lines["weight"][0]
    assert "all rows of expert 3, its inputs are finite" in lines["weight"][0]
    wanted = "not finite: rank 3: the weight layers.1.mlp.experts.down_proj has 1 Inf of 512 in expert 3"
    assert lines["weight"][1] == wanted


def test_random_numbers_go_on_where_they_were() -> None:
    """Also where nothing was remembered, so that the second run draws others than the first."""
    run = Run(config(moe={"jitter_eps": 0.1}))
    before = torch.get_rng_state()
    run.explainer.explain(run.batch(), run.lines.append)
    assert torch.equal(torch.get_rng_state(), before)
