"""`dmoe train` with expert parallelism, in which a router prefers one expert and no loss keeps the load even.

torchrun --nproc_per_node=2 examples/debugging/imbalance.py --run_dir runs/imbalance --profiling.timeline true
"""

import sys

import torch
from tiny import RANK, change_model, train

from dmoe.moe.sharded import local


def plant(model):
    if RANK == 0:  # has the first part of every weight
        with torch.no_grad():
            local(model.layers[1].mlp.router.bias)[0] += 2  # the fault: for expert 0, which is on rank 0


change_model(plant)
sys.exit(
    train(
        parallel__ep="2",
        model__first_k_dense="1",
        model__moe__router_bias="true",
        model__moe__aux_loss_coef="0",
        model__moe__top_k="1",
        model__moe__intermediate_size="4096",
        train__seq_len="256",
        train__steps="10",
    )
)
