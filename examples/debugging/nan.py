"""`dmoe train` in which the experts of one rank give NaN from the third step on.

torchrun --nproc_per_node=2 examples/debugging/nan.py --run_dir runs/nan
"""

import sys

import torch
from tiny import RANK, around_steps, change_model, train

now = 0


def remember_step(run, step):
    global now
    now = step
    return run()


def plant(model):
    def divide(module, inputs, output):
        if now >= 3 and RANK == 1:  # the fault: 0 / 0 for the first two tokens
            output[:2] *= torch.tensor(0.0) / 0
        return output

    model.layers[1].mlp.experts.register_forward_hook(divide)


around_steps(remember_step)
change_model(plant)
sys.exit(train(train__max_skipped_steps="2"))
