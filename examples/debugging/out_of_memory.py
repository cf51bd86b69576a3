"""`dmoe train` with less memory on one rank than a step needs: 250 MiB beside what is there before the first.

torchrun --nproc_per_node=2 examples/debugging/out_of_memory.py --run_dir runs/memory --profiling.memory true
"""

import re
import resource
import sys
from pathlib import Path

from tiny import RANK, change_model, train

LIMIT_MIB = 250


def plant(model):
    if RANK == 1:  # the fault
        used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_MIB * 2**20, resource.RLIM_INFINITY))


change_model(plant)
sys.exit(
    train(
        model__num_layers="8",
        model__moe__intermediate_size="1024",
        train__seq_len="512",
        train__precision="fp32",
        train__steps="4",
    )
)
