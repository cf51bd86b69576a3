"""Every failure is one line on stderr that names the field and its value, with exit code 2 (request) or 1 (run)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from dmoe.cli import main
from dmoe.config import RunConfig
from dmoe.config.overrides import field_names

ROOT = Path(__file__).parents[2]


def fail(capsys, arguments, code=2) -> str:
    """Run, expect `code`, and return the error line."""
    assert main(arguments) == code
    return tiny_run.error_line(capsys.readouterr().err)


WRONG_VALUES = [
    # option, value, what the line must say besides the option
    ("train.steps", "0", "must be greater than 0"),
    ("train.steps", "ten", "'ten': must be an integer"),
    ("train.steps", "1.5", "'1.5': must be an integer"),
    ("train.steps", "nan", "must be an integer"),
    ("train.steps", "inf", "must be an integer"),
    ("train.steps", "", "'': must be an integer"),
    ("train.steps", "-3", "-3: must be greater than 0"),
    ("train.compile", "maybe", "'maybe': must be true or false"),
    ("train.precision", "bf61", "must be one of auto, bf16, fp32, fp64 (did you mean bf16?)"),
    ("train.device", "gpu", "'gpu': must be \"auto\""),
    ("train.device", "meta", "'meta': must be \"auto\""),
    ("train.device", "cuda:99", "this machine has"),
    ("train.seed", "-1", "0 or greater"),
    ("train.seq_len", "65", "at most model.max_seq_len (64)"),
    ("train.batch_size", "5", "divisible by train.micro_batch_size (2)"),
    ("train.micro_batch_size", "3", ""),
    ("optim.lr", "fast", "'fast': must be a number"),
    ("optim.lr", "nan", "finite"),
    ("optim.lr", "inf", "finite"),
    ("model.first_k_dense", "2", "less than model.num_layers (2)"),
    ("optim.lr", "0", "greater than 0"),
    ("optim.betas", "0.9", "must be 2 values"),
    ("optim.betas", "0.9,1", "two numbers in [0, 1)"),
    ("optim.betas", "0.9,x", "'x': must be a number"),
    ("optim.schedule", "cosin", "(did you mean cosine?)"),
    ("optim.decay_fraction", "1.5", "in (0, 1]"),
    ("data.vocab_size", "100", "at least 257"),
    ("data.val_fraction", "1", "between 0 and 1"),
    ("data.corpus", "", 'a path or "stdlib"'),
    ("data.corpus", "/nonexistent/text", "'/nonexistent/text': must be"),
    ("data.tokenizer", "/nonexistent/tokenizer.json", "'/nonexistent/tokenizer.json': must be"),
    ("model.vocab_size", "256", "256: must be at least the tokenizer's 257"),
    ("model.head_dim", "15", "even"),
    ("model.num_heads", "3", ""),
    ("model.moe.top_k", "5", "5: must be at most moe.num_experts (4)"),
    ("model.moe.num_experts", "1", ""),
    ("model.moe.backend", "tritn", "must be one of reference, torch"),
    ("model.moe.hidden_size", "7", "equal to model.hidden_size (32)"),
    ("checkpoint.keep", "1", "at least 2"),
]
OTHER_FIELD = {
    # What the line names instead, where two fields disagree or a shorter path is used.
    ("train.micro_batch_size", "3"): "train.batch_size",
    ("model.num_heads", "3"): "model.head",
    ("model.moe.num_experts", "1"): "moe.top_k",
    ("model.moe.top_k", "5"): "moe.top_k",
}


@pytest.mark.parametrize(("option", "value", "says"), WRONG_VALUES)
def test_wrong_value(tiny, tmp_path, capsys, option, value, says):
    options = tiny | {"run_dir": str(tmp_path / "run"), "model.num_kv_heads": "2", option: value}
    line = fail(capsys, ["train", *tiny_run.arguments(options)])
    named = "model.num_heads" if option == "model.num_heads" else OTHER_FIELD.get((option, value), option)
    assert named in line
    assert says in line
    assert not (tmp_path / "run").exists()  # nothing is left of a run that never was


@pytest.mark.parametrize("value", ["99999999999999999999999999", "18446744073709551616"])
def test_seed_that_torch_cannot_take(tiny, tmp_path, capsys, value):
    options = tiny | {"run_dir": str(tmp_path / "run"), "train.seed": value}
    assert f"train.seed is {value}" in fail(capsys, ["train", *tiny_run.arguments(options)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--train.step", "3"], "unknown option --train.step (did you mean train.steps?)"),
        (["--steps", "3"], "unknown option --steps (did you mean train.steps?)"),
        (["--train.num_experts=3"], "unknown option --train.num_experts (did you mean model.moe.num_experts?)"),
        (["--xyzzy", "3"], "unknown option --xyzzy"),
        (["--train", "3"], "unknown option --train"),
        (["--train.steps"], "option --train.steps needs a value"),
        (["--train.compile", "--train.steps", "3"], "option --train.compile needs a value"),
        (["tiny-moe", "more"], "unexpected argument 'more'"),
        (["tiny-mo"], "preset is 'tiny-mo': must be one of"),
        (["--preset", "olmoe"], "(did you mean olmoe-1b-7b?)"),
    ],
)
def test_wrong_arguments(capsys, arguments, says):
    assert says in fail(capsys, ["train", *arguments])


def test_unknown_verb(capsys):
    assert "unknown verb 'trian' (did you mean train?)" in fail(capsys, ["trian"])


YAML = [
    ("train: {step: 3}", "unknown option train.step (did you mean train.steps?)"),
    ("trian: {steps: 3}", "unknown option trian (did you mean train?)"),
    ("steps: 3", "unknown option steps (did you mean train.steps?)"),
    ("train: 3", "train is 3: must be a section with fields such as train.steps"),
    ("train:", "train is None: must be a section"),
    ("- train", "must be a mapping of sections, not a list"),
    ("just text", "must be a mapping of sections, not a str"),
    ("train: {steps: [3]}", "train.steps is [3]: must be an integer"),
    ("train: {steps: true}", "train.steps is True: must be an integer"),
    ("train: {steps: null}", "train.steps is None: must be an integer"),
    ("optim: {lr: {a: 1}}", "optim.lr is {'a': 1}: must be a number"),
    ("data: {corpus: [a, b]}", "data.corpus is ['a', 'b']"),
    ("preset: tiny-mo", "preset is 'tiny-mo'"),
    ("1: 2", "unknown option 1"),
    ("train: {steps: 3", "line 1: not valid YAML"),
    ("a: b\n\tc: d", "line 2: not valid YAML"),
]


@pytest.mark.parametrize(("content", "says"), YAML)
def test_wrong_yaml(tmp_path, capsys, content, says):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    line = fail(capsys, ["train", str(path)])
    assert says in line
    if "YAML" in says or "mapping" in says:
        assert str(path) in line


def test_yaml_that_is_not_text(tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    assert str(tmp_path / "config.yaml") in fail(capsys, ["train", str(tmp_path / "config.yaml")])


def test_yaml_that_is_missing_or_a_folder(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    assert f"{str(path)!r}: No such file" in fail(capsys, ["train", str(path)])
    path.mkdir()
    assert f"{str(path)!r}: Is a directory" in fail(capsys, ["train", str(path)])


@pytest.mark.parametrize("content", ["", "x", "short text"])
def test_corpus_without_enough_text(tiny, tmp_path, capsys, content):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(content)
    options = tiny | {"run_dir": str(tmp_path / "run"), "data.corpus": str(corpus)}
    line = fail(capsys, ["train", *tiny_run.arguments(options)])
    if content == "short text":  # a corpus, but no window fits
        assert "train.seq_len is 32: must be less than the" in line
    else:
        assert f"data.corpus is {str(corpus)!r}" in line


def test_run_directory_that_holds_a_run(tiny, trained, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    line = fail(capsys, ["train", *tiny_run.arguments(tiny | {"run_dir": str(trained)})])
    assert f"run_dir is {str(trained)!r}: must not hold a run already; --resume continues it" in line
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_run_directory_that_cannot_be_made(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file" / "run", tmp_path / "file", Path("/proc/no/run")):
        line = fail(capsys, ["train", *tiny_run.arguments(tiny | {"run_dir": str(run_dir)})], code=1)
        assert str(run_dir) in line


def test_resume_of_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no run in 'runs'" in fail(capsys, ["train", "--resume"])
    assert "--resume is 'nowhere': must be a run directory" in fail(capsys, ["train", "--resume", "nowhere"])
    assert "--resume is 'nowhere'" in fail(capsys, ["train", "--resume=nowhere"])
    assert "give options only" in fail(capsys, ["train", "tiny-moe", "--resume", "nowhere"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0: must be 0 or greater"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan: must be 0 or greater"),
        (["--prompt", "x", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["--prompt", "x", "--top-k", "-1"], "top_k is -1: must be 0 or greater"),
        (["--prompt", "x", "--top-p", "0"], "top_p is 0.0: must be in (0, 1]"),
        (["--prompt", "x", "--top-p", "1.1"], "top_p is 1.1: must be in (0, 1]"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0: must be greater than 0"),
        (["--prompt", "x", "--device", "gpu"], "is 'gpu': must be"),
        (["--prompt", ""], "prompt is '': must be at least one token"),
        (["--prompt", "x", "--max_token", "3"], "unrecognized arguments: --max_token"),
        (["--prompt", "x", "--top-kk", "3"], "(did you mean --top-k?)"),
        ([], "--prompt"),
    ],
)
def test_generate(trained, capsys, arguments, says):
    assert says in fail(capsys, ["generate", str(trained), *arguments])


def test_generate_and_report_without_a_run(trained, tmp_path, capsys):
    assert "must be a run directory" in fail(capsys, ["generate", str(tmp_path), "--prompt", "x"])
    assert str(tmp_path) in fail(capsys, ["report", str(tmp_path)])
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "must be a checkpoint folder or a run folder" in fail(
        capsys, ["generate", str(tmp_path / "run"), "--prompt=x"]
    )


def test_unexpected_exception_is_one_line_too(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("dmoe.cli.train.build_config", broken)
    assert fail(capsys, ["train"], code=1) == "ZeroDivisionError: two lines (--debug shows where)"
    with pytest.raises(ZeroDivisionError):
        main(["train", "--debug"])
    monkeypatch.setattr("dmoe.cli.train.build_config", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert fail(capsys, ["train"], code=130) == "interrupted"


def test_real_process():
    """Exit code, stderr and --debug as a shell sees them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dmoe", "train", "--train.steps", "0"]
    plain = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert plain.returncode == 2
    assert plain.stderr == "dmoe: error: train.steps is 0: must be greater than 0\n"
    assert plain.stdout == ""
    debug = subprocess.run(
        [*command, "--debug"], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "ConfigError: train.steps is 0: must be greater than 0" in debug.stderr


def test_every_option_is_checked_for_its_type(capsys):
    """A mapping in place of a value is refused for each field of the configuration, and the line names it."""
    from dmoe.config.overrides import apply_overrides
    from dmoe.errors import ConfigError

    for name in field_names(RunConfig):
        *sections, leaf = name.split(".")
        overrides: dict = {leaf: {"a": 1}}
        for section in reversed(sections):
            overrides = {section: overrides}
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            apply_overrides(RunConfig(), overrides)
