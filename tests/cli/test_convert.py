"""`dmoe convert` and `dmoe generate` on what it writes, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dmoe
from dmoe.checkpoint.formats import kind_of, verify
from dmoe.checkpoint.formats.dmoe_run import write_run
from dmoe.cli import main
from dmoe.cli.convert import parse_size
from dmoe.config import ModelConfig, MoEConfig
from dmoe.data.tokenizer import train_bpe
from dmoe.errors import ConfigError
from dmoe.models import Decoder
from tests.checkpoint.formats_source import Weights

# Odd numbers of experts and tied heads are where layouts differ; norms on heads make it a Qwen3-MoE.
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64,
    max_seq_len=80, moe=MoEConfig(num_experts=5, top_k=2, intermediate_size=24),
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with random weights and a tokeniser of its own."""
    folder = tmp_path / "run"
    folder.mkdir()
    train_bpe(["def alpha(beta):\n    return beta + 1\n"] * 9, 290).save(folder / "tokenizer.json")
    write_run(Weights(CONFIG), folder)
    return folder


def ok(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def failed(capsys: pytest.CaptureFixture[str], *args: object, code: int = 2) -> str:
    capsys.readouterr()
    assert main([str(a) for a in args]) == code
    return capsys.readouterr().err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(dmoe.from_pretrained(folder).state_dict())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def test_a_trained_model_goes_to_every_format_and_back(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_logits_of_transformers", _ours)
    before = weights(run)
    for to, *options in (
        ("hf", "--shard-size", "20KB"), ("hf", "--fused"), ("megatron",),
        ("megatron", "--layout", "legacy", "--norms", "local"), ("megablocks",), ("dmoe",),
    ):  # fmt: skip
        there, back = tmp_path / f"{to}{len(options)}", tmp_path / f"{to}{len(options)}-back"
        out = ok(capsys, "convert", run, there, "--to", to, "--verify", *options)
        assert out.startswith(f"{run} (dmoe) -> {there} ({to}): 2 layers, 2 of them mixtures, 0.0")
        assert "\nsame model, by dmoe and " in out
        assert kind_of(there) == to
        out = ok(capsys, "convert", there, back, "--to", "dmoe")
        assert out.startswith(f"{there} ({to}) -> {back} (dmoe)")
        assert equal(weights(back), before)


def _ours(path: Path, ids_BS: torch.Tensor) -> torch.Tensor:
    return dmoe.from_pretrained(path)(ids_BS)


def test_the_tokeniser_of_a_run_is_one_for_transformers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ok(capsys, "convert", run, tmp_path / "hf", "--to", "hf", "--dtype", "bf16")
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["eos_token_id"], config["dtype"], config["model_type"]) == (0, "bfloat16", "qwen3_moe")
    # The same text from each, as nothing was rounded that matters for it.
    ok(capsys, "convert", run, tmp_path / "exact", "--to", "hf")
    prompt = ("--prompt", "def alpha", "--max-new-tokens", "12", "--temperature", "0")
    text = ok(capsys, "generate", run, *prompt)
    assert text.startswith("def alpha")
    assert ok(capsys, "generate", tmp_path / "exact", *prompt) == text
    (tmp_path / "exact" / "tokenizer.json").unlink()
    assert "must have a tokenizer.json" in failed(capsys, "generate", tmp_path / "exact", *prompt)


def test_a_result_that_is_not_the_same_exits_with_1(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "MAX_DIFFERENCE", -1.0)
    capsys.readouterr()
    assert main(["convert", str(run), str(tmp_path / "a"), "--to", "dmoe", "--verify"]) == 1
    assert "NOT the same model" in capsys.readouterr().out


def test_verify_takes_the_text_it_is_given(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("def alpha(beta):\n" * 100)
    ok(capsys, "convert", run, tmp_path / "a", "--to", "dmoe", "--verify", "--text", text)
    text.write_text("short")
    arguments = ("convert", run, tmp_path / "a", "--to", "dmoe", "--overwrite")
    assert "must have at least 256 tokens" in failed(capsys, *arguments, "--verify", "--text", text)
    assert "must be a file" in failed(capsys, *arguments, "--verify", "--text", tmp_path / "no")
    assert "must be left out without --verify" in failed(capsys, *arguments, "--text", text)


def test_wrong_requests_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*options: object, source: Path = run) -> str:
        message = failed(capsys, "convert", source, tmp_path / "x", *options)
        assert message.count("\n") == 1
        assert not (tmp_path / "x").exists()
        return message

    assert "the following arguments are required: --to" in error()
    assert "invalid choice: 'gguf'" in error("--to", "gguf")
    assert "--famly (did you mean --family?)" in error("--to", "hf", "--famly", "x")
    assert "--tp is 2: must be left out with --to hf; it is of --to megatron" in error("--to", "hf", "--tp", "2")
    assert "--layer is 'MoE': must be left out with --to hf" in error("--to", "hf", "--layer", "MoE")
    assert "--shard-size is '5 apples': must be a size such as 5GB" in error("--to", "hf", "--shard-size", "5 apples")
    assert "config with source" in error("--to", "hf", "--source-config", "tiny-moe")
    assert "must be an existing directory" in error("--to", "hf", source=tmp_path / "nowhere")
    assert "source is" in error("--to", "hf", source=tmp_path)
    assert "--family is 'lama': must be one of" in error("--to", "hf", "--family", "lama")
    assert "qk_norm" in error("--to", "hf", "--family", "mixtral")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2 << 30), ("1.5kB", 1500), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "5XB", "1e9", "0.1"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="--shard-size is"):
        parse_size(text)


def test_decoder_is_what_the_run_holds(run: Path) -> None:
    reference = Decoder(CONFIG)
    reference.init_weights(seed=1)
    assert equal(weights(run), dict(reference.state_dict()))
