"""Options: precedence, spelling, conversion, YAML and help."""

import dataclasses
import inspect
import json
import re
import typing

import pytest
import tiny_run

from dmoe import __version__
from dmoe.cli import VERBS, main
from dmoe.cli.options import build_config, parse_overrides
from dmoe.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    config_to_yaml,
)
from dmoe.config.overrides import field_names, read_yaml
from dmoe.errors import ConfigError
from dmoe.models import PRESETS, get_preset


def test_command_line_over_yaml_over_preset_over_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("preset: olmoe-1b-7b\nmodel: {num_layers: 3, moe: {top_k: 4}}\ntrain: {steps: 7, seed: 5}\n")
    config = build_config(str(path), ["--train.steps", "9", "--model.moe.top_k=2"])
    olmoe = get_preset("olmoe-1b-7b")
    assert config.preset == "olmoe-1b-7b"
    assert config.train.steps == 9  # command line over YAML
    assert config.model.moe.top_k == 2  # command line over YAML over preset
    assert config.model.num_layers == 3  # YAML over preset
    assert config.train.seed == 5
    assert config.model.moe.num_experts == olmoe.moe.num_experts == 64  # preset over default
    assert config.optim == OptimConfig()  # default
    assert (
        build_config(str(path), ["--preset=mixtral-8x7b"]).model.hidden_size == get_preset("mixtral-8x7b").hidden_size
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_by_name(preset):
    assert build_config(preset, []).model == get_preset(preset)
    assert build_config(None, ["--preset", preset]).model == get_preset(preset)


def test_no_arguments_are_the_default_preset():
    assert build_config(None, []) == RunConfig(model=get_preset(RunConfig().preset))


@pytest.mark.parametrize("spelling", ["--train.batch_size", "--train.batch-size"])
@pytest.mark.parametrize("equals", [True, False])
def test_spellings(spelling, equals):
    arguments = [f"{spelling}=48"] if equals else [spelling, "48"]
    assert build_config(None, arguments).train.batch_size == 48


def test_values_that_look_like_options():
    assert build_config(None, ["--train.sample_prompt=--x=y"]).train.sample_prompt == "--x=y"
    assert build_config(None, ["--train.sample_prompt", "-x"]).train.sample_prompt == "-x"
    assert build_config(None, ["--run_dir="]).run_dir == ""
    assert parse_overrides(["--optim.lr=1", "--optim.lr=2"]) == {"optim": {"lr": "2"}}  # the last one counts


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("train.steps", "1e3", 1000),
        ("train.steps", "+12", 12),
        ("train.seed", "9007199254740993", 2**53 + 1),  # a float would round it
        ("optim.lr", "1", 1.0),
        ("optim.lr", "3e-4", 3e-4),
        ("optim.betas", "0.8,0.9", (0.8, 0.9)),
        ("optim.betas", "0.8 0.9", (0.8, 0.9)),
        ("train.compile", "TRUE", True),
        ("train.compile", "no", False),
        ("train.compile", "1", True),
        ("model.moe.backend", "none", None),
        ("model.moe.backend", "reference", "reference"),
        ("model.moe.precision", "fp8", "fp8"),
    ],
)
def test_conversion(option, text, value):
    got = typing.cast(typing.Any, build_config(None, [f"--{option}={text}"]))
    for name in option.split("."):
        got = getattr(got, name)
    assert got == value
    assert type(got) is type(value)


def test_second_name_of_the_expert_width():
    assert build_config("tiny-moe", ["--model.moe.expert_hidden_size", "72"]).model.moe.intermediate_size == 72


def test_list_of_any_length(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: tiny-moe\nmodel: {moe_layer_pattern: [0, 1, 0, 1]}\n")
    from_file = build_config(str(tmp_path / "c.yaml"), [])
    from_line = build_config("tiny-moe", ["--model.moe_layer_pattern", "0,1,0,1"])
    assert from_file.model == from_line.model
    assert from_line.model.moe_layers() == [1, 3]
    with pytest.raises(ConfigError, match=r"model.moe_layer_pattern is \(0, 1\): must be 4 numbers"):
        build_config("tiny-moe", ["--model.moe_layer_pattern", "0,1"])


def test_yaml_numbers_without_a_dot(tmp_path):
    # YAML 1.1 reads 3e-4 as text
    (tmp_path / "c.yml").write_text("optim: {lr: 3e-4, betas: [0, 0.5]}\ntrain: {steps: 1e3, compile: yes}\n")
    config = build_config(str(tmp_path / "c.yml"), [])
    assert (config.optim.lr, config.optim.betas, config.train.steps, config.train.compile) == (
        3e-4,
        (0, 0.5),
        1000,
        True,
    )


def changed(config):
    """`config` with every leaf field different from its default, as far as the checks allow."""
    special = {"score_function": "sigmoid", "activation": "gelu", "backend": "reference", "qk_norm": "full"}
    special |= {"schedule": "wsd", "precision": "bf16", "preset": "tiny-dense", "top_k": 3, "betas": (0.5, 0.25)}
    special |= {"head_dim": 62, "num_heads": 6, "num_kv_heads": 3, "batch_size": 60, "micro_batch_size": 30}
    special |= {"dp_shard": 2, "exchange": "bf16", "ep_sends": "picks"}  # "tokens" goes with no bound of rows
    if isinstance(config, ParallelConfig):
        special["schedule"] = "gpipe"
    if isinstance(config, MoEConfig):
        special["precision"] = "same"  # "fp8" goes with no other backend than the default
        special |= {"routing": "topk", "softmax_after_topk": False, "n_group": 3, "topk_group": 2}
        special |= {"router_dtype": "fp64", "drop_policy": "position", "global_aux_loss_coef": 0.0}
    special |= {"init": "mup", "init_depth": "layer", "moe_layer_pattern": ()}
    special |= {"norm": "layer", "layer_attention": ("full", "sliding", "chunked", "full", "full")}
    special |= {"layer_rope": (1, 0, 1, 1, 1), "scaling": "longrope", "factor": 2.0}
    special |= {"short_factors": (0.5,) * 10, "long_factors": (1.5,) * 10}  # of a third of 62 dimensions
    special |= {"targets": ("experts",), "freeze": ("router",), "dropout": 0.5}
    special |= {"kv_lora_rank": 0, "q_lora_rank": 0, "qk_rope_head_dim": 66}  # latent attention goes with no other kind
    special |= {"max_seq_len": 8192, "vocab_size": 5000, "seq_len": 100, "hidden_size": 0, "tokenizer": "a b: 'c'"}
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = changed(value)
        elif field.name in special and not (field.name == "hidden_size" and isinstance(config, ModelConfig)):
            changes[field.name] = special[field.name]
        elif isinstance(value, bool):
            changes[field.name] = not value
        elif isinstance(value, str):
            changes[field.name] = 'x: "#é\\n'
        elif isinstance(value, int):
            changes[field.name] = value + 1
        else:
            changes[field.name] = value / 3 + 1e-9
    return dataclasses.replace(config, **changes)


FP8 = {"precision": "fp8", "backend": None, "intermediate_size": 272, "latent_size": 16}
HASH = {"routing": "hash", "softmax_after_topk": True, "score_function": "softmax"} | {
    "expert_bias_rate": 0.0,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.parametrize("moe", [{}, FP8, HASH], ids=["", "fp8", "hash"])
def test_yaml_round_trip(tmp_path, moe):
    config = changed(RunConfig())
    model = config.model
    config = dataclasses.replace(config, model=dataclasses.replace(model, moe=dataclasses.replace(model.moe, **moe)))
    for section in ("data", "optim", "train", "checkpoint", "parallel", "profiling"):
        for field in dataclasses.fields(getattr(config, section)):
            ours, default = (getattr(getattr(c, section), field.name) for c in (config, RunConfig()))
            assert ours != default or field.name == "ep_sends"
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert build_config(str(path), []) == config
    written = read_yaml(path)
    for name in field_names(RunConfig):  # every field is written out, under its first name
        if name.endswith(".expert_hidden_size"):
            continue
        place = written
        for part in name.split("."):
            place = place[part]


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_round_trip_of_presets(tmp_path, preset):
    config = build_config(preset, [])
    (tmp_path / "c.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert build_config(str(tmp_path / "c.yaml"), []) == config


def test_config_of_a_run_is_the_one_it_ran_with(tiny, trained):
    config = build_config(str(trained / "config.yaml"), [])
    assert config.run_dir == str(trained)
    assert config.train.steps == 150
    expected = tiny | {"run_dir": str(trained), "data.tokenizer": "bpe"}
    assert config.data.corpus == expected["data.corpus"]


def help_of(capsys, *arguments) -> str:
    try:
        code = main([*arguments, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert not code
    return capsys.readouterr().out


def words(text: str) -> str:
    """Without box drawing and line breaks."""
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())


def field_docs(cls) -> dict[str, str]:
    """Doc string under each field, read from the source."""
    found = re.findall(r'^    (\w+):[^\n]*\n    """(.*?)"""', inspect.getsource(cls), re.M | re.S)
    return {name: words(doc) for name, doc in found}


def test_help_of_train_has_every_field_with_its_doc(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # wider ones put boxes side by side
    text = help_of(capsys, "train")
    for name in field_names(RunConfig):
        assert re.search(rf"--{re.escape(name)}\b", text), name
    shown = words(text).replace(" ", "")
    for cls in (RunConfig, ModelConfig, MoEConfig, DataConfig, OptimConfig, TrainConfig, CheckpointConfig):
        docs = field_docs(cls)
        leaves = {
            f.name for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(typing.get_type_hints(cls)[f.name])
        }
        assert leaves <= docs.keys(), f"{cls.__name__}: a field without a doc"
        for name in leaves:
            assert docs[name].replace(" ", "") in shown, f"{cls.__name__}.{name}"
    for preset in PRESETS:
        assert preset in text
    for word in ("--resume", "SIGINT", "YAML", "128 + signal"):
        assert word in words(text), word


def test_help_of_dmoe_lists_every_verb(capsys):
    text = help_of(capsys)
    for verb, what in VERBS.items():
        assert verb in text
        assert what in text
    assert main([]) == 2
    assert main(["help"]) == 0


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(capsys, verb):
    text = help_of(capsys, verb)
    assert f"usage: dmoe {verb}" in text
    options = re.findall(r"^  +(--[a-z][\w.-]+)[^\n]*", text, re.M)
    assert "--help" in text
    assert len(set(options)) == len(options)


def test_help_of_generate_explains_every_option(capsys):
    text = words(help_of(capsys, "generate"))
    for option in ("--prompt", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--device"):
        assert option in text
    for doc in ("0: greedy", "(default: 200)", "(default: 0.7)", "k most likely"):
        assert doc in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dmoe {__version__}\n"


def test_train_ends_with_sample_comparison_and_report(tiny, tmp_path, capsys):
    options = tiny | {"run_dir": str(tmp_path / "run"), "train.steps": "2", "train.sample_tokens": "5"}
    assert main(["train", *tiny_run.arguments(options)]) == 0
    captured = capsys.readouterr()
    assert "bits/byte; zlib -9 needs" in captured.out
    assert f"report: {tmp_path / 'run' / 'report.html'}" in captured.out
    assert (tmp_path / "run" / "sample.txt").read_text(encoding="utf-8").startswith("def ")
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"config.yaml", "model.json", "tokenizer.json"}
    assert not list((tmp_path / "run").rglob("*tmp*"))
    assert main(["report", str(tmp_path / "run")]) == 0


def test_resume_takes_new_options_of_the_optimiser(tiny, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *tiny_run.arguments(tiny | {"run_dir": str(run), "train.steps": "1"})]) == 0
    options = ["--train.steps", "2", "--optim.weight_decay", "0.5", "--optim.eps", "0.001"]
    assert main(["train", "--resume", str(run), *options]) == 0
    trainer = json.loads((run / "checkpoints" / "step-00000002" / "trainer.json").read_text())
    groups = trainer["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["eps"]) for group in groups.values()] == [(0.5, 0.001), (0.0, 0.001)]


def test_resume_refuses_what_it_would_ignore(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *tiny_run.arguments(tiny | {"run_dir": str(run), "train.steps": "1"})]) == 0
    for arguments in (["--resume", str(run), "--run_dir", "elsewhere"], ["tiny-moe", "--resume", str(run)]):
        capsys.readouterr()
        assert main(["train", *arguments]) == 2
        assert "--resume" in capsys.readouterr().err


def test_bench_makes_the_folder_of_its_json(tmp_path):
    path = tmp_path / "new" / "folder" / "layer.json"
    shape = ["--shape", "16,8,4,2,8", "--dtype", "fp32", "--rounds", "1"]
    assert main(["bench", "layer", *shape, "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert set(result["seconds"]) == {"dense", "dmoe (torch)", "loop", "grouped_mm", "padded_bmm"}


def test_mistyped_option_is_named_before_the_required_one_that_it_replaces(capsys):
    assert main(["generate", "run", "--promt", "x"]) == 2
    assert "--promt (did you mean --prompt?)" in capsys.readouterr().err


def test_resume_refuses_fewer_steps_than_are_done(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *tiny_run.arguments(tiny | {"run_dir": str(run), "train.steps": "2"})]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--train.steps", "1"]) == 2
    assert "train.steps is 1: must be at least the 2 steps already done" in capsys.readouterr().err
