"""The checks of the configuration dataclasses, and what they compute."""

import dataclasses
import math
import typing

import pytest

from dmoe.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    config_to_yaml,
)
from dmoe.errors import ConfigError, DmoeError, RunError

SECTIONS = {
    "moe": MoEConfig, "model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "train": TrainConfig,
    "checkpoint": CheckpointConfig,
}  # fmt: skip


def numbers(cls):
    hints = typing.get_type_hints(cls)
    return [f.name for f in dataclasses.fields(cls) if hints[f.name] in (int, float)]


@pytest.mark.parametrize(("section", "name"), [(s, n) for s, cls in SECTIONS.items() for n in numbers(cls)])
def test_every_number_refuses_negative_values_and_nan(section, name):
    cls = SECTIONS[section]
    for value in (-1, math.nan):
        if value != value and typing.get_type_hints(cls)[name] is int:
            continue
        with pytest.raises(ConfigError, match=rf"{section}\.\w+ is .*: must be ") as error:
            cls(**{name: value})
        assert f"{section}.{name}" in str(error.value)
        assert repr(value) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoEConfig(num_experts=2, top_k=3), r"moe.top_k is 3: must be at most moe.num_experts \(2\)"),
        (lambda: MoEConfig(activation="clamped_swiglu", gated=False), "moe.gated is False: must be True"),
        (lambda: ModelConfig(num_heads=6, num_kv_heads=4), r"model.num_heads is 6: .*model.num_kv_heads \(4\)"),
        (lambda: ModelConfig(head_dim=7), "model.head_dim is 7: must be even"),
        (lambda: ModelConfig(hidden_size=8, moe=MoEConfig(hidden_size=9)), r"model.moe.hidden_size is 9: .*\(8\)"),
        (lambda: DataConfig(corpus=""), "data.corpus is ''"),
        (lambda: DataConfig(val_fraction=0.0), "data.val_fraction is 0.0"),
        (lambda: DataConfig(vocab_size=256), "data.vocab_size is 256: must be at least 257"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), r"optim.betas is \(0.9, 1.0\)"),
        (lambda: OptimConfig(decay_fraction=0.0), "optim.decay_fraction is 0.0"),
        (lambda: TrainConfig(batch_size=6, micro_batch_size=4), r"train.batch_size is 6: .*micro_batch_size \(4\)"),
        (lambda: TrainConfig(seed=2**63), "train.seed is 9223372036854775808"),
        (lambda: CheckpointConfig(keep=1), "checkpoint.keep is 1: must be at least 2"),
        (
            lambda: RunConfig(model=ModelConfig(max_seq_len=32), train=TrainConfig(seq_len=33)),
            r"train.seq_len is 33: must be at most model.max_seq_len \(32\)",
        ),
        (
            lambda: RunConfig(model=ModelConfig(vocab_size=300), data=DataConfig(vocab_size=301)),
            r"data.vocab_size is 301: must be at most model.vocab_size \(300\)",
        ),
    ],
)
def test_checks_between_fields(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_bounds_themselves_are_allowed():
    MoEConfig(num_experts=3, top_k=3, aux_loss_coef=0, z_loss_coef=0)
    DataConfig(vocab_size=257)
    OptimConfig(decay_fraction=1.0, betas=(0.0, 0.0), clip_norm=0, warmup_steps=0)
    TrainConfig(eval_every=0, seed=0, sample_tokens=0, batch_size=1, micro_batch_size=1)
    CheckpointConfig(every=0, keep=2)
    RunConfig(model=ModelConfig(max_seq_len=32), train=TrainConfig(seq_len=32))
    # A tokeniser that is not trained takes no notice of data.vocab_size.
    RunConfig(model=ModelConfig(vocab_size=300), data=DataConfig(tokenizer="bytes", vocab_size=5000))


@pytest.mark.parametrize(
    ("freq", "first", "layers"),
    [(1, 0, [0, 1, 2, 3, 4, 5]), (1, 2, [2, 3, 4, 5]), (2, 0, [0, 2, 4]), (2, 1, [2, 4]), (0, 0, []), (0, 9, [])],
)
def test_moe_layers(freq, first, layers):
    assert ModelConfig(num_layers=6, moe_layer_freq=freq, first_k_dense=first).moe_layers() == layers


def test_layer_config_takes_the_width_of_the_model():
    config = ModelConfig(hidden_size=48, moe=MoEConfig(top_k=1))
    assert config.layer_moe_config() == MoEConfig(hidden_size=48, top_k=1)
    assert config.moe.hidden_size == 0


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().train.steps = 3


def test_errors_have_exit_codes_and_ordinary_bases():
    assert (ConfigError.exit_code, RunError.exit_code) == (2, 1)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(RunError, RuntimeError)
    assert issubclass(ConfigError, DmoeError)
    assert issubclass(RunError, DmoeError)


def test_yaml_is_plain():
    text = config_to_yaml(RunConfig())
    assert "!!" not in text  # no Python tags: any YAML reader takes it
    assert "betas:\n  - 0.9\n  - 0.95\n" in text
    assert "  moe:\n    hidden_size: 0\n" in text


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (MoEConfig, "score_function", "foo"),
        (MoEConfig, "activation", "swish"),
        (MoEConfig, "backend", "cuda"),
        (MoEConfig, "top_k", 2.5),
        (ModelConfig, "qk_norm", "foo"),
        (OptimConfig, "schedule", "linear"),
        (TrainConfig, "precision", "fp16"),
        (TrainConfig, "steps", True),
    ],
)
def test_choices_and_integers_are_checked_in_python_too(config, field, value):
    with pytest.raises(ConfigError, match=rf"{field} is {value!r}: must be (one of|an integer)"):
        config(**{field: value})


def test_a_sample_needs_a_prompt():
    with pytest.raises(ConfigError, match=r"train\.sample_prompt"):
        TrainConfig(sample_prompt="")
    TrainConfig(sample_prompt="", sample_tokens=0)
