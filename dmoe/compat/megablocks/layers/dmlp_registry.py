"""The experts' class for each `mlp_type` and `mlp_impl`."""

from __future__ import annotations

from dmoe.compat.megablocks.layers import glu, mlp
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.config import require

MlpType = mlp.SparseMLP

_REGISTRY: dict[str, dict[str, type[mlp.SparseMLP]]] = {
    "mlp": {"grouped": mlp.GroupedMLP, "sparse": mlp.SparseMLP},
    "glu": {"grouped": glu.GroupedGLU, "sparse": glu.SparseGLU},
}


def get(args: Arguments) -> MlpType:
    """New experts for a `dMoE`.

    Raises:
        ConfigError: `mlp_type` or `mlp_impl` is unknown.
    """
    require(args.mlp_type in _REGISTRY, "mlp_type", args.mlp_type, f"one of {', '.join(_REGISTRY)}")
    classes = _REGISTRY[args.mlp_type]
    require(args.mlp_impl in classes, "mlp_impl", args.mlp_impl, f"one of {', '.join(classes)}")
    return classes[args.mlp_impl](args)
