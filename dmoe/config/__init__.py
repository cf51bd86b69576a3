"""The dataclasses of a run: every field, its default, its meaning and the checks on it.

A run is one `RunConfig`; its sections are the nested dataclasses. `overrides` puts YAML and the command line
into it. All are frozen: use `dataclasses.replace`. Checks raise `ConfigError` naming the field, its value and a
value that would be right.
"""

from dmoe.config.attention import LatentAttentionConfig, RopeConfig
from dmoe.config.checks import require
from dmoe.config.model import ModelConfig
from dmoe.config.moe import Activation, Backend, MoEConfig
from dmoe.config.parallel import (
    SINGLE_STAGE_SCHEDULES,
    SPLIT_BACKWARD_SCHEDULES,
    V_SCHEDULES,
    ParallelConfig,
    Schedule,
)
from dmoe.config.profiling import ProfilingConfig
from dmoe.config.run import RunConfig, config_to_yaml
from dmoe.config.train import CheckpointConfig, DataConfig, LoRAConfig, OptimConfig, TrainConfig

__all__ = [
    "SINGLE_STAGE_SCHEDULES",
    "SPLIT_BACKWARD_SCHEDULES",
    "V_SCHEDULES",
    "Activation",
    "Backend",
    "CheckpointConfig",
    "DataConfig",
    "LatentAttentionConfig",
    "LoRAConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ProfilingConfig",
    "RopeConfig",
    "RunConfig",
    "Schedule",
    "TrainConfig",
    "config_to_yaml",
    "require",
]
