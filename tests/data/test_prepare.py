"""Preparing a corpus: the split, the cache, interrupted and simultaneous builds."""

import hashlib
import importlib
import os
import random
import signal
import subprocess
import sys
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dmoe.config import DataConfig
from dmoe.data import prepare, read_corpus
from dmoe.data.split import held_out_documents, split_text
from dmoe.errors import ConfigError, RunError

prepare_module = importlib.import_module("dmoe.data.prepare")


INDENTS = ["", "    "]  # long text is cut only before lines without indentation


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """60 small documents, and a cache folder of its own."""
    rng = random.Random(0)
    (tmp_path / "corpus").mkdir()
    for i in range(60):
        lines = (
            f"{rng.choice(INDENTS)}value_{rng.randrange(50)} = {rng.randrange(10**6)}  # grün\n"
            for _ in range(rng.randrange(1, 30))
        )
        (tmp_path / "corpus" / f"{i:02}.py").write_text(f"def f{i}():\n{''.join(lines)}", encoding="utf-8")
    return DataConfig(
        corpus=str(tmp_path / "corpus"), vocab_size=400, val_fraction=0.2, cache_dir=str(tmp_path / "cache")
    )


def prepare_quietly(config: DataConfig):
    return prepare(config, progress=False)


def texts_of(side, tokenizer) -> list[str]:
    starts = side.doc_starts.tolist()
    return [tokenizer.decode(side.tokens[a:b]) for a, b in pairwise(starts)]


def entries(config: DataConfig) -> list[str]:
    return sorted(os.listdir(config.cache_dir))


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_both_sides_hold_the_corpus(config, kind, monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_CHARS", 1500)  # several batches, documents in several pieces
    monkeypatch.setattr(prepare_module, "PIECE_CHARS", 200)
    data = prepare_quietly(replace(config, tokenizer=kind))
    expected: dict[bool, list[str]] = {False: [], True: []}
    for document in read_corpus(config):
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        expected[int(digest[:16], 16) / 16**16 < 0.2].append(document.text)
    assert texts_of(data.train, data.tokenizer) == expected[False]
    assert texts_of(data.val, data.tokenizer) == expected[True]
    assert 5 <= len(expected[True]) <= 20
    ends = data.val.tokens[data.val.doc_starts[1:] - 1]
    assert set(ends.tolist()) == {data.tokenizer.eos_id}

    raw = "".join(expected[True]).encode()
    assert data.val_text_bytes == data.val.meta.text_bytes == len(raw)
    assert data.tokenizer.token_bytes()[data.val.tokens].sum() == len(raw)
    assert data.zlib_bits_per_byte == pytest.approx(8 * len(zlib.compress(raw, 9)) / len(raw), abs=8 * 8 / len(raw))


def test_bpe_is_trained_on_the_training_side_only(tmp_path):
    (tmp_path / "c").mkdir()
    held, kept = sorted(("qqqq " * 50, "zzzz " * 50), key=lambda text: hashlib.sha256(text.encode()).digest())
    (tmp_path / "c" / "1").write_text(held)
    (tmp_path / "c" / "2").write_text(kept)
    data = prepare_quietly(DataConfig(corpus=str(tmp_path / "c"), val_fraction=1e-9, cache_dir=str(tmp_path)))
    assert texts_of(data.val, data.tokenizer) == [held]
    assert len(data.tokenizer.encode(held[:4])) == 4
    assert len(data.tokenizer.encode(kept[:4])) == 1


def test_split_moves_nothing_when_documents_come_or_the_order_changes():
    digests = [hashlib.sha256(bytes([i])).digest() for i in range(200)]
    held = {d for d, val in zip(digests, held_out_documents(digests, 0.1)) if val}
    assert 5 <= len(held) <= 40
    fewer = digests[:100][::-1]
    assert {d for d, val in zip(fewer, held_out_documents(fewer, 0.1)) if val} == held & set(fewer)
    larger = {d for d, val in zip(digests, held_out_documents(digests, 0.3)) if val}
    assert held < larger


@pytest.mark.parametrize(("fraction", "held"), [(1e-9, [True, False, False]), (1 - 1e-9, [True, True, False])])
def test_split_leaves_no_side_empty(fraction, held):
    assert held_out_documents([b"\x20" * 32, b"\x30" * 32, b"\xf0" * 32], fraction) == held


@pytest.mark.parametrize(
    ("text", "train"),
    [
        ("line\n" * 100, "line\n" * 90),
        ("line\n" * 20 + "x" * 14, "line\n" * 20),  # the last line end, a little early
        ("a\n" + "b" * 98, "a\n" + "b" * 88),  # the only line end is far away
        ("x" * 100 + "\n", "x" * 90),
        ("ab", "a"),
        ("\n\n", "\n"),
    ],
)
def test_one_text_is_cut_near_its_end(text, train):
    assert split_text(text, 0.1) == (train, text[len(train) :])


def test_corpus_of_one_document(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"line {i} grün\r\n" for i in range(100)), newline="", encoding="utf-8")
    config = DataConfig(corpus=str(tmp_path / "one.txt"), tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    data = prepare_quietly(config)
    (train,), (val,) = (texts_of(side, data.tokenizer) for side in (data.train, data.val))
    assert (train + val).encode() == (tmp_path / "one.txt").read_bytes()
    assert val.startswith("line 9")
    assert train.endswith("\r\n")
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"data\.corpus is .*longer than one character"):
        prepare_quietly(config)


def test_cache_hit_builds_nothing(config, monkeypatch, tmp_path):
    first = prepare_quietly(config)
    assert entries(config) == [first.folder.name]

    def no_build(*args: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(prepare_module, "_build", no_build)
    second = prepare_quietly(config)
    assert (second.folder, second.zlib_bits_per_byte) == (first.folder, first.zlib_bits_per_byte)
    # The same documents elsewhere, and settings that do not matter, are the same entry.
    (tmp_path / "corpus").rename(tmp_path / "moved")
    assert prepare_quietly(replace(config, corpus=str(tmp_path / "moved"), text_field="x")).folder == first.folder


def test_key_changes_with_everything_that_matters(config, tmp_path):
    config = replace(config, tokenizer="bytes")
    keys = [prepare_quietly(config).folder.name]
    assert prepare_quietly(replace(config, vocab_size=500)).folder.name == keys[0]  # bytes have no vocabulary size
    keys.append(prepare_quietly(replace(config, val_fraction=0.3)).folder.name)
    keys += [prepare_quietly(replace(config, tokenizer="bpe", vocab_size=v)).folder.name for v in (300, 301)]
    file = Path(config.corpus) / "00.py"
    file.write_bytes(file.read_bytes() + b"#")
    keys.append(prepare_quietly(config).folder.name)
    file.rename(file.with_name("0.py"))
    keys.append(prepare_quietly(config).folder.name)
    assert len(set(keys)) == 6
    assert entries(config) == sorted(keys)


def test_saved_tokenizer_as_tokenizer_path(config):
    first = prepare_quietly(config)
    second = prepare_quietly(replace(config, tokenizer=str(first.folder / "tokenizer.json")))
    assert second.train.tokens.tolist() == first.train.tokens.tolist()


@pytest.mark.parametrize("name", ["train/tokens.bin", "val/doc_starts.npy", "tokenizer.json", "dataset.json", "val"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_entry_is_built_again(config, name, damage, capsys):
    config = replace(config, tokenizer="bytes")
    first = prepare_quietly(config)
    tokens = first.train.tokens.tolist()
    path = first.folder / name
    if name == "val" or damage == "gone":
        path.rename(path.with_name("elsewhere"))
    else:
        path.write_bytes(path.read_bytes()[:-3])
    second = prepare(config, progress=True)
    assert "again" in capsys.readouterr().err
    assert second.train.tokens.tolist() == tokens
    assert entries(config) == [first.folder.name]


def test_progress_is_plain_lines_on_stderr(config, capsys):
    prepare(config)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split("(")[0].strip() for line in err.splitlines()] == [
        f"data: reading {config.corpus}", "data: training a BPE of 400 tokens", "data: encoding",
    ]  # fmt: skip


def test_cache_folder_from_the_environment(config, tmp_path, monkeypatch):
    monkeypatch.setenv("DMOE_CACHE", str(tmp_path / "env"))
    folder = prepare_quietly(replace(config, cache_dir="", tokenizer="bytes")).folder
    assert folder.parent == tmp_path / "env"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir is .*: must be a folder that can be written"):
        prepare_quietly(replace(config, cache_dir=str(tmp_path / "file")))


def test_corpus_that_changes_between_readings_is_an_error(config, monkeypatch):
    scan = prepare_module._scan

    def scan_then_change(*args: object) -> object:
        result = scan(*args)
        (Path(config.corpus) / "30.py").unlink()
        return result

    monkeypatch.setattr(prepare_module, "_scan", scan_then_change)
    with pytest.raises(RunError, match="changed while it was read"):
        prepare_quietly(config)
    assert entries(config) == []


def start(script: str, config: DataConfig) -> "subprocess.Popen[str]":
    """Run `script` in a process of its own; it finds `config` and the module `p`."""
    head = f"import importlib, os, time; from dmoe.config import DataConfig; config = {config!r}\n"
    code = head + "p = importlib.import_module('dmoe.data.prepare')\n" + script
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare_module.__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_build_leaves_no_entry(config):
    script = (
        "p.TokenWriter.finish = lambda self: os.kill(os.getpid(), 9)\n"  # train and val are written, not finished
        "p.prepare(config, progress=False)"
    )
    process = start(script, replace(config, tokenizer="bytes"))
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL
    (left,) = entries(config)
    assert left.startswith(".")
    os.utime(Path(config.cache_dir) / left, (0, 0))  # long ago: removed by the next build
    data = prepare_quietly(replace(config, tokenizer="bytes"))
    assert entries(config) == [data.folder.name]


def test_two_builds_at_once_agree(config, tmp_path):
    # Each waits with its finished build until the other has one, so that both really publish.
    script = f"""
build = p._build
def build_and_wait(config, scan, tokenizer, folder, progress):
    build(config, scan, tokenizer, folder, progress)
    open({str(tmp_path)!r} + f"/done-{{os.getpid()}}", "w").close()
    while sum(n.startswith("done-") for n in os.listdir({str(tmp_path)!r})) < 2:
        time.sleep(0.01)
    print((folder / "tokenizer.json").read_bytes().hex())
    print((folder / "train" / "tokens.bin").read_bytes().hex())
p._build = build_and_wait
print(p.prepare(config, progress=False).train.meta)
"""
    processes = [start(script, config) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]  # training is deterministic across processes
    assert outputs[0].count("\n") == 3
    assert entries(config) == [prepare_quietly(config).folder.name]
