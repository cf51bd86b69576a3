"""A whole run, and its YAML."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dmoe.config.checks import require
from dmoe.config.model import ModelConfig
from dmoe.config.parallel import ParallelConfig
from dmoe.config.profiling import ProfilingConfig
from dmoe.config.train import CheckpointConfig, DataConfig, OptimConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run."""

    preset: str = "tiny-moe"
    """Model preset that `model` starts from; see `dmoe train --help`. With `train.init_from` the folder's name."""
    run_dir: str = ""
    """Folder of the run. "": runs/PRESET-DATE-TIME."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

    def __post_init__(self) -> None:
        require(
            self.train.seq_len <= self.model.max_seq_len,
            "train.seq_len", self.train.seq_len, f"at most model.max_seq_len ({self.model.max_seq_len})",
        )  # fmt: skip
        require(
            self.data.tokenizer != "bpe" or self.data.vocab_size <= self.model.vocab_size,
            "data.vocab_size", self.data.vocab_size, f"at most model.vocab_size ({self.model.vocab_size})",
        )  # fmt: skip
        moe, train = self.model.moe, self.train
        if train.compile:
            wanted = 'another than "sinkhorn" with train.compile: its stop test is read on the host'
            require(moe.routing != "sinkhorn", "model.moe.routing", moe.routing, wanted)
        if moe.global_aux_loss_coef and train.compile and train.activation_checkpointing:
            wanted = "0 with train.compile and train.activation_checkpointing: a recomputed graph counts the load anew"
            require(False, "model.moe.global_aux_loss_coef", moe.global_aux_loss_coef, wanted)


def config_to_yaml(config: Any) -> str:
    """A config dataclass as YAML, every field written out."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return yaml.safe_dump(plain(asdict(config)), sort_keys=False, allow_unicode=True)
