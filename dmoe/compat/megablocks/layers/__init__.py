"""The layers of MegaBlocks."""

from dmoe.compat.megablocks.layers import (
    activation_fn,
    all_to_all,
    arguments,
    common,
    dmlp_registry,
    dmoe,
    gelu,
    glu,
    mlp,
    moe,
    mpu,
    router,
    sharedexpert_registry,
)

__all__ = [
    "activation_fn",
    "all_to_all",
    "arguments",
    "common",
    "dmlp_registry",
    "dmoe",
    "gelu",
    "glu",
    "mlp",
    "moe",
    "mpu",
    "router",
    "sharedexpert_registry",
]
