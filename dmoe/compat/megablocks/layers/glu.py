"""The gated experts of `dMoE`, and the gated shared expert."""

from __future__ import annotations

from torch import Tensor, nn

from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.expert_compute import Activation, compute_rows
from dmoe.compat.megablocks.layers.mlp import SharedMLP, SparseMLP


class SparseGLU(SparseMLP):
    """y = (act(x w1_i^T) * (x v1_i^T)) w2_i: `w1`, `w2` and `v1`, each [e * F, D]."""

    v1: nn.Parameter

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self._add_weight("v1", self._num_rows_per_rank, args.hidden_size).copy_(self._draw(args.init_method))

    def _weights_EFD(self) -> tuple[Tensor, Tensor | None, Tensor]:
        return self._view(self.w1), self._view(self.v1), self._view(self.w2)


class GroupedGLU(SparseGLU):
    """`SparseGLU` by the name of `mlp_impl="grouped"`; the same computation."""


class MemoryOptimizedGroupedGLU:
    """`GroupedGLU` as a function of its weights; see `mlp.MemoryOptimizedMLP`."""

    @staticmethod
    def apply(x: Tensor, w1: Tensor, v1: Tensor, w2: Tensor, batch_sizes: Tensor, activation_fn: Activation) -> Tensor:
        """Rows [R, D] grouped by expert, weights [e, F, D], and the number of rows of each expert [e]; [R, D]."""
        return compute_rows(x, batch_sizes, w1, v1, w2, activation_fn, memory_optimized=True)


memory_optimized_grouped_glu = MemoryOptimizedGroupedGLU.apply


class SharedGLU(SharedMLP):
    """The gated shared expert: down_proj(act(gate_proj(x)) * up_proj(x))."""

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self.gate_proj = args.fc_cls(args.hidden_size, args.shared_expert_hidden_size, **self.fc_kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
