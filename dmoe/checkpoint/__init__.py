"""Training checkpoints: save, verify, load.

    run_dir/checkpoints/latest                    name of the newest whole checkpoint, for people and scripts
    run_dir/checkpoints/step-00000250/
        __0_0.distcp, ...                         tensors, one file or more a rank (torch.distributed.checkpoint, DCP)
        .metadata                                 which tensor lies where (DCP)
        trainer.json                              every value of the state that is not a tensor
        manifest.json                             format, step, torch version, size and SHA-256 of every file

A checkpoint is written under a temporary name and published by a rename, so a folder called `step-...` was whole when
it appeared. With torch.distributed initialised, every function that takes a state is collective: all ranks call it.
"""

from dmoe.checkpoint.async_saver import AsyncSaver
from dmoe.checkpoint.load import load_checkpoint, load_latest, load_model_weights
from dmoe.checkpoint.manifest import find_checkpoints, verify_checkpoint
from dmoe.checkpoint.rng import capture_rng, restore_rng
from dmoe.checkpoint.save import save_checkpoint
from dmoe.checkpoint.training_state import restore_training_state, training_state

__all__ = [
    "AsyncSaver",
    "capture_rng",
    "find_checkpoints",
    "load_checkpoint",
    "load_latest",
    "load_model_weights",
    "restore_rng",
    "restore_training_state",
    "save_checkpoint",
    "training_state",
    "verify_checkpoint",
]
