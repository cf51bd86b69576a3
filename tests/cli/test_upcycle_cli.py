"""`dmoe upcycle`: from a directory to a directory, what it says, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny_run import train_lines

from dmoe.checkpoint.formats import convert, from_pretrained, load_into, read_config
from dmoe.checkpoint.formats.hf import write_hf
from dmoe.checkpoint.upcycle import ModelSource, UpcyclePlan
from dmoe.cli import main
from dmoe.cli.init_from import start_from
from dmoe.cli.options import parse_overrides
from dmoe.config import ModelConfig
from dmoe.models import Decoder
from dmoe.train import train

BASE = {
    "vocab_size": 260, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "max_seq_len": 64, "qk_norm": "none", "moe_layer_freq": 0, "tie_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that transformers wrote, in bf16."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
        bos_token_id=7, eos_token_id=[8, 9],
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("upcycle") / "llama"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with norms of heads, as Qwen3: a run of ours at step 0."""
    model = Decoder(ModelConfig(**(BASE | {"qk_norm": "head", "num_layers": 3, "max_seq_len": 256})))
    model.init_weights()
    path = tmp_path_factory.mktemp("upcycle") / "dense"
    from dmoe.checkpoint.formats.dmoe_run import write_run

    path.mkdir()
    write_run(ModelSource(model), path)
    return path


def upcycle(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["upcycle", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@torch.no_grad()
def transformers_error(dense: Path, mixture: Path) -> float:
    """Largest difference of the logits that transformers computes, relative to their size."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(260, (2, 40))
    wanted, logits = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits for path in (dense, mixture)
    )
    return ((logits - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("granularity", [1, 4])
def test_transformers_computes_the_same_with_the_mixtral_of_a_llama(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], granularity: int
) -> None:
    dst = tmp_path / "mixtral"
    args = (llama, dst, "--num-experts", 6, "--top-k", 2, "--granularity", granularity, "--verify")
    code, out, err = upcycle(capsys, *args)
    assert (code, err) == (0, "")
    assert "Hugging Face family mixtral" in out
    assert "function: preserved exactly" in out
    assert "top-1 agreement 100.00%" in out
    config = json.loads((dst / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (6 * granularity, 2 * granularity)
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (7, [8, 9], "bfloat16")
    assert transformers_error(llama, dst) < 1e-4


def test_run_that_is_upcycled_exports_and_trains(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    args = ("--num-experts", 3, "--top-k", 1, "--granularity", 2, "--layers", "after-1", "--to", "dmoe", "--verify")
    code, out, err = upcycle(capsys, qwen, run, *args)
    assert code == 0
    assert err == f"dmoe: warning: {qwen} has no tokenizer.json; dmoe generate and dmoe train need one\n"
    assert "2 of 3 layers with 6 experts of width 24, 2 a token (Hugging Face family qwen3_moe)" in out
    assert read_config(run).moe_layers() == [1, 2]
    assert convert(run, tmp_path / "hf", "hf").config.moe.num_experts == 6
    ids = torch.randint(260, (2, 16))
    with torch.no_grad():
        logits = [from_pretrained(path)(ids) for path in (qwen, run, tmp_path / "hf")]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits[2], logits[1])
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(f'{{"text": "{i} and {i} make {2 * i}"}}' for i in range(300)), encoding="utf-8")
    options = {
        "run_dir": tmp_path / "trained", "data.corpus": text, "data.tokenizer": "bytes", "train.steps": 2,
        "data.cache_dir": tmp_path / "cache", "train.seq_len": 32, "train.device": "cpu", "train.sample_tokens": 0,
        "train.peak_tflops": 1, "train.tensorboard": "false", "train.log_every": 1,
    }  # fmt: skip
    config = start_from(str(run), parse_overrides([f"--{name}={value}" for name, value in options.items()]))
    assert train(config).step == 2
    steps = train_lines(tmp_path / "trained")
    assert steps[0]["loss"] == pytest.approx(math.log(260), rel=0.2)  # that of the dense model, which knows nothing
    assert steps[0]["grad_norm"] > 0


def test_a_llamas_run_exports_as_a_mixtral_with_its_token_ids(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, args = tmp_path / "run", ("--num-experts", 2, "--top-k", 1, "--to", "dmoe", "--dtype", "fp32")
    code, out, _ = upcycle(capsys, llama, run, *args)
    assert code == 0
    assert "function: preserved exactly" in out
    assert "note: with one expert a token" in out
    convert(run, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["bos_token_id"], config["eos_token_id"]) == ("mixtral", 7, [8, 9])


def test_what_changes_the_function_is_said_and_measured(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words, over and over. " * 20, encoding="utf-8")
    args = ("--num-experts", 4, "--top-k", 2, "--method", "drop", "--verify", "--text", text, "--dtype", "fp16")
    code, out, _ = upcycle(capsys, llama, tmp_path / "drop", *args)
    assert code == 0
    expected = re.search(r"function: not preserved \(method drop\): .* off by ([\d.]+)% of its", out)
    assert expected is not None
    assert 50 < float(expected[1]) < 100
    kl = re.search(r"KL ([\d.e-]+) nats", out)
    assert kl is not None
    assert float(kl[1]) > 1e-4
    assert re.search(r"on 256 tokens: .* perplexity [\d.]+ before and [\d.]+ after", out)
    code, out, _ = upcycle(capsys, llama, tmp_path / "half", "--num-experts", 4, "--top-k", 2, "--dtype", "fp16")
    assert "preserved but for the rounding of weights (stored as float16)" in out


@pytest.mark.parametrize(
    ("options", "family"),
    [(("--shared", 16, "--granularity", 2), "granitemoe"), (("--shared", 48, "--shared-gate"), "qwen2_moe")],
)
def test_transformers_computes_the_same_with_a_shared_expert(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], family: str
) -> None:
    args = ("--num-experts", 4, "--top-k", 2, *options, "--verify")
    code, out, _ = upcycle(capsys, llama, tmp_path / "new", *args)
    assert code == 0
    assert f"a token and a shared expert of width {options[1]} (Hugging Face family {family})" in out
    assert "top-1 agreement 100.00%" in out
    assert transformers_error(llama, tmp_path / "new") < 1e-4


def test_the_same_command_writes_the_same_bytes(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--num-experts", 3, "--top-k", 2, "--method", "drop", "--shuffle")
    files = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert upcycle(capsys, llama, tmp_path / name, *args, "--seed", seed)[0] == 0
        torch.rand(3)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_bad_requests_are_one_line_and_write_nothing(
    llama: Path, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture, dst = tmp_path / "mixture", tmp_path / "dst"
    model = Decoder(ModelConfig(**(BASE | {"moe_layer_freq": 1})))
    mixture.mkdir()
    write_hf(ModelSource(model), mixture)
    two = ("--num-experts", 2, "--top-k", 1)
    for args, message in {
        (mixture, dst, *two): "mixture-of-experts layers of the source is [0, 1]: must be none",
        (
            llama,
            dst,
            *two,
            "--granularity",
            5,
        ): "upcycle.granularity is 5: must be a divisor of",
        (llama, dst, "--num-experts", 2, "--top-k", 3): "upcycle.top_k is 3: must be at most upcycle.num_experts (2)",
        (llama, dst, "--top-k", 3): "dmoe upcycle: the following arguments are required: --num-experts",
        (llama, dst, *two, "--methd", "copy"): "unrecognized arguments: --methd (did you mean --method?)",
        (llama, dst, *two, "--score-function", "sigmoid"): "--to dmoe needs no family",
        (llama, dst, *two, "--family", "olmoe"): "must be",
        (llama, dst, *two, "--to", "dmoe", "--family", "mixtral"): "left out with --to dmoe",
        (llama, llama, *two): "must be new or an empty folder",
        (llama, llama.parent, *two, "--overwrite"): "must be apart from the source",
        (llama, dst, *two, "--text", "a.txt"): "must be left out without --verify",
        (tmp_path / "no", dst, *two): "must be an existing directory",
    }.items():
        code, out, err = upcycle(capsys, *args)
        assert (code, out) == (2, ""), args
        assert message in err, args
        assert err.count("\n") == 1, args
        assert not dst.exists(), args
    assert [p.name for p in tmp_path.iterdir()] == ["mixture"]


def test_verify_fails_if_the_function_should_be_kept_and_is_not(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UpcyclePlan, "routed_scale", lambda self, width: 2.0)
    code, _, err = upcycle(capsys, llama, tmp_path / "wrong", "--num-experts", 2, "--top-k", 1, "--verify")
    assert code == 1
    assert "the upcycled model differs from the dense one: KL is" in err


def test_loading_a_part_reads_what_was_made(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upcycle(capsys, llama, tmp_path / "new", "--num-experts", 4, "--top-k", 1)[0] == 0
    model = Decoder(read_config(tmp_path / "new"))
    load_into(model, tmp_path / "new")
    source = from_pretrained(llama).layers[1].mlp.down_proj.weight
    assert all(torch.equal(expert, source) for expert in model.layers[1].mlp.experts.down_proj)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["upcycle", "--help"])
    out = capsys.readouterr().out
    for name in (field.name for field in fields(UpcyclePlan)):
        option = "shared" if name == "shared_size" else name.replace("_", "-")
        assert f"--{option}" in out
    assert "(default: 0.5)" in out
