"""The interface of MegaBlocks, for code and checkpoints written for it; see `docs/megablocks.md`.

Everything of MegaBlocks that consumers name is reachable from here by attribute, as after `import megablocks`.
"""

from dmoe.compat.megablocks import backend as backend
from dmoe.compat.megablocks import grouped_gemm_util as grouped_gemm_util
from dmoe.compat.megablocks import layers as layers
from dmoe.compat.megablocks import ops as ops
from dmoe.compat.megablocks._version import __version__ as __version__
from dmoe.compat.megablocks.backend import kernels as _kernels  # noqa: F401  for megablocks.backend.kernels
from dmoe.compat.megablocks.installation import install as install
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.dmoe import ParallelDroplessMLP, dMoE
from dmoe.compat.megablocks.layers.glu import SparseGLU
from dmoe.compat.megablocks.layers.mlp import MLP, SparseMLP
from dmoe.compat.megablocks.layers.moe import MoE, ParallelMLP, get_load_balancing_loss

__all__ = [
    "MLP",
    "Arguments",
    "MoE",
    "ParallelDroplessMLP",
    "ParallelMLP",
    "SparseGLU",
    "SparseMLP",
    "dMoE",
    "get_load_balancing_loss",
]
