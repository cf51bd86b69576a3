"""One model over many ranks: the device mesh, and one file for each way to split.

    mesh = build_mesh(config.parallel, device_type="cuda")
    parts = parallelize(config.model, mesh, config.train)     # on meta
    for part in parts:
        part.to_empty(device=device)
        part.init_weights(seed)

Axes: pp (`pipeline`), dp_replicate and dp_shard (`fsdp`), cp (`context`), tp (`tensor`), ep (`expert`).
"""

from dmoe.parallel.layout import parallelize
from dmoe.parallel.loss import loss_function
from dmoe.parallel.mesh import ParallelMesh, build_mesh, check_model, init_process_group, resolve
from dmoe.parallel.pipeline import Pipeline

__all__ = [
    "ParallelMesh",
    "Pipeline",
    "build_mesh",
    "check_model",
    "init_process_group",
    "loss_function",
    "parallelize",
    "resolve",
]
