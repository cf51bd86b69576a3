"""Decoding: greedy by hand, end marks, windows, seeds, and `dmoe generate`."""

import shutil

import pytest
import torch

from dmoe.cli import main
from dmoe.config import ModelConfig, MoEConfig
from dmoe.errors import ConfigError
from dmoe.generate import generate_tokens
from dmoe.models import Decoder

VOCAB, WINDOW = 23, 6


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_seq_len=WINDOW,
        init_std=0.5, moe=MoEConfig(intermediate_size=8, num_experts=4, top_k=2),
    )  # fmt: skip
    model = Decoder(config)
    model.init_weights(3)
    return model.eval()


def greedy_by_hand(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-WINDOW:]]))
        ids.append(max(range(VOCAB), key=lambda v: logits[0, -1, v].item()))
    return ids


@pytest.mark.parametrize("prompt", [[1], [5, 9, 2], list(range(WINDOW)), list(range(15))])
def test_greedy_equals_argmax_by_hand_also_past_the_window(model, prompt):
    tokens = list(generate_tokens(model, prompt, 12))
    assert prompt + tokens == greedy_by_hand(model, prompt, 12)
    assert tokens == list(generate_tokens(model, prompt, 12))
    assert len(set(tokens)) > 1


def test_prompt_is_not_changed_and_the_count_is_a_limit(model):
    prompt = [1, 2]
    assert len(list(generate_tokens(model, prompt, 7))) == 7
    assert list(generate_tokens(model, prompt, 0)) == []
    assert prompt == [1, 2]


def test_end_mark_stops_and_is_not_given(model):
    tokens = list(generate_tokens(model, [1], 12))
    eos = tokens[4]
    assert list(generate_tokens(model, [1], 12, eos_id=eos)) == tokens[: tokens.index(eos)]


def test_end_mark_in_the_prompt_does_not_stop(model):
    first = next(generate_tokens(model, [1], 1))
    other = next(v for v in range(VOCAB) if v != first)
    assert len(list(generate_tokens(model, [other, 1], 1, eos_id=other))) == 1


def test_seeds(model):
    def sample(seed):
        return list(generate_tokens(model, [1, 2], 20, temperature=1.0, seed=seed))

    assert sample(0) == sample(0)
    assert len({tuple(sample(seed)) for seed in range(5)}) == 5


def test_default_generator_is_not_used(model):
    before = torch.get_rng_state()
    list(generate_tokens(model, [1], 5, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_top_k_1_is_greedy(model):
    assert list(generate_tokens(model, [4], 10, temperature=3.0, top_k=1)) == list(generate_tokens(model, [4], 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1: must be 0 or greater"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, r"top_p is 0\.0: must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
    ],
)
def test_errors(model, options, message):
    with pytest.raises(ConfigError, match=message):
        list(generate_tokens(model, [1], 3, **options))
    with pytest.raises(ConfigError, match="prompt is ''"):
        list(generate_tokens(model, [], 3))


class TestCommand:
    def run(self, capsys, *arguments):
        assert main(["generate", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    def test_continues_the_prompt_as_the_corpus_goes(self, trained, capsys):
        text = self.run(capsys, trained, "--prompt", "def alpha_1", "--max-new-tokens", 30, "--temperature", 0)
        assert text.startswith("def alpha_1(")
        assert "return" in text  # every function of the corpus has one
        assert text == self.run(
            capsys, trained, "--prompt=def alpha_1", "--max-new-tokens=30", "--temperature=0", "--seed=7"
        )

    def test_seed(self, trained, capsys):
        texts = [self.run(capsys, trained, "--prompt=d", "--temperature=1.5", "--seed", seed) for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_prompt_longer_than_the_window(self, trained, capsys):
        prompt = "def naïve_1(beta):\n    return beta + 1\n\n" * 10
        text = self.run(capsys, trained, "--prompt", prompt, "--max-new-tokens", 3)
        assert text.startswith(prompt)
        assert len(text) > len(prompt) + 1

    def test_a_damaged_checkpoint_is_an_error(self, trained, tmp_path, capsys):
        run_dir = shutil.copytree(trained, tmp_path / "run")
        (checkpoint,) = (path for path in (run_dir / "checkpoints").iterdir() if path.is_dir())
        with (checkpoint / "__0_0.distcp").open("ab") as file:
            file.write(b"x")
        with pytest.warns(UserWarning, match="too long"):
            assert main(["generate", str(run_dir), "--prompt=x"]) == 1
        assert "dmoe: error: all 1 checkpoints" in capsys.readouterr().err
