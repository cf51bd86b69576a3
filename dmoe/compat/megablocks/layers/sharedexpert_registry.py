"""The shared expert's class for each `mlp_type`."""

from __future__ import annotations

from dmoe.compat.megablocks.layers import glu, mlp
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.config import require

_REGISTRY: dict[str, type[mlp.SharedMLP]] = {"mlp": mlp.SharedMLP, "glu": glu.SharedGLU}


def get(args: Arguments) -> mlp.SharedMLP:
    """A new shared expert.

    Raises:
        ConfigError: `mlp_type` is unknown.
    """
    require(args.mlp_type in _REGISTRY, "mlp_type", args.mlp_type, f"one of {', '.join(_REGISTRY)}")
    return _REGISTRY[args.mlp_type](args)
