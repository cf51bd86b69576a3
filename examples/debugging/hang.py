"""`dmoe train` in which one rank leaves a collective out.

torchrun --nproc_per_node=2 examples/debugging/hang.py --run_dir runs/hang
"""

import sys

import torch
import torch.distributed as dist
from tiny import RANK, around_steps, train


def step_and_count(run, step):
    result = run()
    if step == 4 and RANK != 1:  # the fault: an all-reduce that is not called on all ranks
        dist.all_reduce(torch.tensor(result.loss))
    return result


around_steps(step_and_count)
sys.exit(train(profiling__hang_timeout="4", profiling__hang_abort="true"))
