"""Validation against an independent computation, and a run that really learns."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmoe.checkpoint import load_model_weights
from dmoe.cli.options import build_config
from dmoe.data import prepare
from dmoe.models import Decoder
from dmoe.train import evaluate
from dmoe.train.engine import Engine


@pytest.fixture(scope="module")
def setting(trained):
    config = build_config(str(trained / "config.yaml"), [])
    model = Decoder(config.model)
    load_model_weights(trained, model)
    return (
        model,
        prepare(config.data, progress=False),
        replace(config.train, seq_len=13, batch_size=5, micro_batch_size=5),
    )


def nats_by_position(model, tokens, seq_len):
    """-log p of every token but the first: one window at a time, unpadded, log-softmax in numpy's float64."""
    result = []
    for start in range(0, len(tokens) - 1, seq_len):
        window = [int(t) for t in tokens[start : start + seq_len + 1]]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([window[:-1]]))[0].double().numpy()
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        result += [-log_p[i, target] for i, target in enumerate(window[1:])]
    return np.array(result)


def test_whole_text(setting):
    model, data, config = setting
    tokens = np.array(data.val.tokens)
    assert (len(tokens) - 1) % config.seq_len != 0, "the last window must need padding"
    assert len(range(0, len(tokens) - 1, config.seq_len)) % config.micro_batch_size != 0, "and the last batch"
    nats = nats_by_position(model, tokens, config.seq_len)
    assert len(nats) == len(tokens) - 1
    result = evaluate(Engine([model], config, torch.device("cpu")), data)
    assert result.whole
    assert result.loss == pytest.approx(nats.mean(), rel=1e-5)
    # The bytes are those of the text, but for the first token, which is not predicted.
    first = len(data.tokenizer.decode([int(tokens[0])]).encode())
    assert result.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / (data.val_text_bytes - first), rel=1e-5)


@pytest.mark.parametrize("max_batches", [1, 2, 3])
def test_part_of_the_text(setting, max_batches):
    model, data, config = setting
    tokens = np.array(data.val.tokens)
    nats = nats_by_position(model, tokens, config.seq_len)
    size = config.seq_len * config.micro_batch_size
    batches = math.ceil(len(nats) / size)
    assert batches > 3
    chosen = [(i * batches) // max_batches for i in range(max_batches)]
    positions = np.concatenate([np.arange(len(nats))[b * size : (b + 1) * size] for b in chosen])
    text = "".join(data.tokenizer.decode([int(t)]) for t in tokens[1:][positions])
    assert "\ufffd" not in text, "choose a seq_len that cuts no character in two"
    result = evaluate(Engine([model], config, torch.device("cpu")), data, max_batches=max_batches)
    assert not result.whole
    assert result.loss == pytest.approx(nats[positions].mean(), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats[positions].sum() / math.log(2) / len(text.encode()), rel=1e-5)


def test_more_batches_than_there_are_read_the_whole_text(setting):
    model, data, config = setting
    whole = evaluate(Engine([model], config, torch.device("cpu")), data)
    assert evaluate(Engine([model], config, torch.device("cpu")), data, max_batches=10**6) == whole


@pytest.mark.parametrize("training", [True, False])
def test_leaves_mode_and_gradients_alone(setting, training):
    model, data, config = setting
    model.train(training)
    evaluate(Engine([model], config, torch.device("cpu")), data, max_batches=1)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_tiny_run_learns(trained, setting):
    """Held-out loss far below the unigram entropy, which no model of single tokens can beat; and finite throughout."""
    _, data, _ = setting
    counts = np.bincount(np.array(data.val.tokens))
    shares = counts[counts > 0] / counts.sum()
    unigram = float(-(shares * np.log(shares)).sum())
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    final = [line for line in lines if line["kind"] == "eval"][-1]
    assert final["whole"]
    assert final["loss"] < 0.6 * unigram
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[0] == pytest.approx(math.log(320), abs=0.2)  # an untrained model is undecided between its tokens
    assert all(math.isfinite(loss) for loss in losses)


def test_metrics_lines_are_complete(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    line = [line for line in lines if line["kind"] == "train"][9]
    assert line["step"] == 10
    assert line["tokens"] == 10 * 8 * 32
    assert line["moe_layers"] == [0, 1]
    assert [len(load) for load in line["expert_load"]] == [4, 4]
    assert [sum(load) for load in line["expert_load"]] == pytest.approx([1, 1], abs=1e-4)
    assert all(1 <= x <= 2 for x in line["max_over_mean"])  # at most E / K
    assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["step_seconds"])
    assert line["mfu"] == pytest.approx(line["model_tflops"] / 1.0)
