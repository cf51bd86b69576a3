"""The training loop, its optimiser, metrics and validation."""

from dmoe.train.evaluate import EvalResult, evaluate
from dmoe.train.loop import TrainResult, train
from dmoe.train.optim import build_optimizer, learning_rate

__all__ = ["EvalResult", "TrainResult", "build_optimizer", "evaluate", "learning_rate", "train"]
