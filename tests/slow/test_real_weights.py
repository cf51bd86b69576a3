"""Real weights through the whole kit: read, perplexity, upcycling, training, export."""

from __future__ import annotations

import json
import math
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dmoe
from dmoe.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def perplexity(logits_BSV: torch.Tensor, ids_BS: torch.Tensor) -> float:
    return math.exp(F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).double(), ids_BS[:, 1:].flatten()))


@torch.no_grad()
def ours(folder: Path, ids_BS: torch.Tensor) -> float:
    return perplexity(dmoe.from_pretrained(folder)(ids_BS), ids_BS)


@torch.no_grad()
def theirs(folder: Path, ids_BS: torch.Tensor) -> float:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return perplexity(model(ids_BS).logits, ids_BS)


@pytest.fixture(scope="module")
def dense_perplexity(smollm2, text_ids) -> float:
    return theirs(smollm2, text_ids)


def test_perplexity_of_the_dense_model(smollm2, text_ids, dense_perplexity):
    assert 5 < dense_perplexity < 30  # it can read
    assert ours(smollm2, text_ids) == pytest.approx(dense_perplexity, rel=1e-4)


@pytest.fixture(scope="module")
def upcycled(smollm2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("upcycled") / "hf"
    assert main(["upcycle", str(smollm2), str(folder), "--num-experts", "4", "--top-k", "2", "--to", "hf"]) == 0
    return folder


def test_upcycled_model_is_as_good(upcycled, text_ids, dense_perplexity):
    assert json.loads((upcycled / "config.json").read_text())["num_local_experts"] == 4
    assert ours(upcycled, text_ids) == pytest.approx(dense_perplexity, rel=1e-3)
    assert theirs(upcycled, text_ids) == pytest.approx(dense_perplexity, rel=1e-3)


def test_trains_and_goes_back_to_hugging_face(upcycled, text_ids, dense_perplexity, tmp_path):
    run, texts = tmp_path / "run", tmp_path / "texts"
    texts.mkdir()
    for name, text in pydoc_data.topics.topics.items():
        (texts / f"{name}.txt").write_text(text)
    arguments = ["--run-dir", str(run), "--data.corpus", str(texts), "--train.steps", "20", "--train.batch-size", "2",
                 "--train.seq-len", "128", "--train.micro-batch-size", "2", "--train.eval-every", "20",
                 "--train.eval-batches", "1", "--train.log-every", "1", "--train.sample-tokens", "0",
                 "--optim.lr", "1e-5", "--optim.warmup-steps", "2"]  # fmt: skip
    assert main(["train", "--init-from", str(upcycled), *arguments]) == 0
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert sum(losses[-5:]) < sum(losses[:5])
    exported = tmp_path / "exported"
    assert main(["convert", str(run), str(exported), "--to", "hf"]) == 0
    after = theirs(exported, text_ids)
    assert after == pytest.approx(ours(run, text_ids), rel=1e-4)
    assert after != pytest.approx(dense_perplexity, rel=1e-5)  # it has learned
    assert after < 1.5 * dense_perplexity
