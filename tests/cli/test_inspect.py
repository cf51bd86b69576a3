"""`dmoe inspect` on runs, their checkpoints and converted models, in this process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import error_line

from dmoe.checkpoint.formats import convert, read_config
from dmoe.checkpoint.formats.dmoe_run import write_run
from dmoe.cli import main
from dmoe.config import ModelConfig, MoEConfig
from dmoe.data.tokenizer import ByteTokenizer, train_bpe
from dmoe.observe.inspect import pictures
from dmoe.observe.routing import load
from tests.checkpoint.formats_source import Weights

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64,
    max_seq_len=80, first_k_dense=1, moe=MoEConfig(num_experts=5, top_k=2, intermediate_size=24),
)  # fmt: skip
TEXT = "def alpha(beta):\n    return beta + 1\n"


def make_run(folder: Path, config: ModelConfig = CONFIG) -> Path:
    folder.mkdir()
    train_bpe([TEXT] * 9, 290).save(folder / "tokenizer.json")
    write_run(Weights(config), folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and have tests of their own."""
    monkeypatch.setattr(pictures, "draw", lambda inspection: {})


def ok(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[Path, dict[str, Any], str]:
    """Folder, JSON and output."""
    capsys.readouterr()
    assert main(["inspect", *map(str, args), "--device", "cpu"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    page = Path(out.splitlines()[-1])
    return page.parent, json.loads((page.parent / "inspect.json").read_text(encoding="utf-8")), out


def failed(capsys: pytest.CaptureFixture[str], *args: object, code: int = 2) -> str:
    capsys.readouterr()
    assert main(["inspect", *map(str, args)]) == code
    return error_line(capsys.readouterr().err)


def test_a_run_that_learned(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, corpus = tmp_path / "trained", trained.parent / "tiny" / "corpus.txt"
    shutil.copytree(trained, run)
    folder, data, out = ok(capsys, run, "--text", corpus, "--max-tokens", "3000")
    assert folder == run / "inspect"
    assert {path.name for path in folder.iterdir()} == {"inspect.html", "inspect.json", "routing.npz", "plots"}
    assert data["text"]["tokens"] == 3000
    assert data["bits_per_byte"] < 0.6  # it was trained on this text
    assert data["name"] == "trained, step 150"
    assert all(0.2 < layer["specialization"] <= 1 for layer in data["layers"])
    assert "trained, step 150: loss 0." in out
    page = (folder / "inspect.html").read_text(encoding="utf-8")
    assert "3,000 tokens of corpus.txt" in page
    assert "2 layers · 4 experts, top-2 · topk by softmax" in page


@pytest.mark.usefixtures("no_pictures")
def test_a_converted_model_routes_as_before(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(run, tmp_path / "hf", "hf")
    convert(run, tmp_path / "megatron", "megatron")
    folder, data, _ = ok(capsys, "hf", "--text", text, "--max-tokens", "200", "--against", run)
    assert folder == Path("inspect-hf")
    assert [layer["layer"] for layer in data["layers"]] == [1, 2]
    assert data["against"]["name"] == "run, step 0"
    assert data["against"]["loss"] == data["loss"]
    for layer in data["against"]["layers"]:
        assert (layer["equal_picks"], layer["load_divergence"]) == (1, 0)
    # Megatron's files: no tokeniser of their own if there is none.
    (tmp_path / "megatron" / "tokenizer.json").unlink(missing_ok=True)
    assert "must have a tokenizer.json; --tokenizer PATH" in failed(capsys, "megatron", "--text", text)
    _, again, _ = ok(
        capsys, "megatron", "--text", text, "--max-tokens", "200", "--tokenizer", run, "--out", tmp_path / "there"
    )
    assert (tmp_path / "there" / "inspect.html").is_file()
    assert [layer["experts"] for layer in again["layers"]] == [layer["experts"] for layer in data["layers"]]


@pytest.mark.usefixtures("no_pictures")
def test_steps_of_a_run(trained: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (last,) = [path for path in (run / "checkpoints").iterdir() if path.is_dir()]
    start = tmp_path / "start"
    start.mkdir()
    write_run(Weights(read_config(run)), start)
    shutil.move(start / "checkpoints" / "step-00000000", run / "checkpoints")
    common = ("--text", text, "--max-tokens", 300, "--out", tmp_path / "out")
    _, newest, _ = ok(capsys, run, *common)
    _, named, _ = ok(capsys, run, "--step", 150, *common)
    _, folder, _ = ok(capsys, last, *common)
    assert newest == named == folder
    out, first, _ = ok(capsys, run, "--step", 0, *common, "--against-step", 150)
    assert first["name"] == "run, step 0"
    assert first["against"]["name"] == "run, step 150"
    assert first["against"]["loss"] == newest["loss"]
    assert all(layer["equal_picks"] < 1 for layer in first["against"]["layers"])
    assert load(out / "routing.npz").step == 0
    message = failed(capsys, run, "--step", 7, *common)
    assert message.startswith("--step is 7: must be a step that model")
    assert message.endswith("has a checkpoint of: 0, 150")
    assert failed(capsys, run, "--against-step", 7, *common).startswith("--against-step is 7: must be a step")


@pytest.mark.usefixtures("no_pictures")
def test_texts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "docs.jsonl"
    lines.write_text("".join(json.dumps({"body": t}) + "\n" for t in ("return beta", "def alpha", "return")))
    folder, data, _ = ok(capsys, run, "--text", lines, "--text-field", "body")
    bpe = train_bpe([TEXT] * 9, 290)
    wanted = [*bpe.encode("return beta"), bpe.eos_id, *bpe.encode("def alpha"), bpe.eos_id, *bpe.encode("return")]
    assert data["text"]["tokens"] == len(wanted)
    assert "⟨end⟩" in (folder / "inspect.html").read_text(encoding="utf-8")
    _, data, _ = ok(capsys, run, "--text", lines, "--text-field", "body", "--max-tokens", "3")
    assert data["text"]["tokens"] == 3
    assert "--show is -1: must be at least 0" in failed(capsys, run, "--text", lines, "--show", "-1")
    message = failed(capsys, run, "--text", lines)
    assert "has no field 'text' (--text-field); its fields: 'body'" in message
    assert failed(capsys, run, "--text", tmp_path / "no.txt").startswith("--text is '")
    _, data, _ = ok(capsys, run, "--max-tokens", "50", "--no-png")
    assert data["text"] == data["text"] | {"name": "Python's standard library", "tokens": 50}


def test_wrong_requests_are_one_line(run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*options: object, model: object = run) -> str:
        return failed(capsys, model, "--text", text, "--max-tokens", 100, *options)

    assert "--max-tokens is 0: must be at least 1" in error("--max-tokens", 0)
    assert "--seq-len is 1: must be at least 2" in error("--seq-len", 1)
    assert "--seq-len is 81: must be at most model.max_seq_len (80)" in error("--seq-len", 81)
    assert "invalid choice: 'fp8'" in error("--dtype", "fp8")
    assert "--tokeniser (did you mean --tokenizer?)" in error("--tokeniser", "x")
    assert "--device is 'tpu'" in error("--device", "tpu")
    assert "--layers is '1,x': must be numbers" in error("--layers", "1,x")
    assert "layers is 0: must be MoE layers of the model: 1, 2" in error("--layers", "0")
    assert "no such directory" in error(model=tmp_path / "nowhere")
    assert "source is" in error(model=tmp_path)
    checkpoint = run / "checkpoints" / "step-00000000"
    assert "no run directory" in error("--step", 0, model=checkpoint)
    dense = make_run(tmp_path / "dense", replace(CONFIG, first_k_dense=0, moe_layer_freq=0))
    assert "must have mixture-of-experts layers, but it is a dense model" in error(model=dense)
    more = make_run(tmp_path / "more", replace(CONFIG, moe=replace(CONFIG.moe, num_experts=6)))
    assert "num_experts of more, step 0 is 6: must be 5, as in run, step 0" in error("--against", more)
    fewer = make_run(tmp_path / "fewer", replace(CONFIG, num_layers=2))
    assert "moe_layers of fewer, step 0 is" in error("--against", fewer)
    other = make_run(tmp_path / "other")
    ByteTokenizer().save(other / "tokenizer.json")
    assert "must have the same tokeniser" in error("--against", other)
    small = make_run(tmp_path / "small", replace(CONFIG, vocab_size=64))
    assert "model.vocab_size of small, step 0 is 64: must be more than" in error(model=small)
    assert not (run / "inspect").exists()
