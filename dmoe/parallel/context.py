"""Context parallel: a sequence is split over "cp" and every rank gathers the keys and values of all of it.

Rank r of c holds the r-th and the r-th last of 2c equal pieces, so that every rank has as much of the causal triangle
to compute (as in Llama 3, arXiv:2407.21783, section 3.3.2, which gathers keys and values too).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.errors import ConfigError
from dmoe.models import Decoder
from dmoe.models.attention import causal_attention
from dmoe.ops.collectives import all_gather_rows
from dmoe.parallel.mesh import ParallelMesh


def apply_context_parallel(part: Decoder, mesh: ParallelMesh) -> None:
    """Make a part work on this rank's pieces of each sequence. In place."""
    axis = mesh.context["cp"]
    rank, size = axis.get_local_rank(), axis.size()
    if size == 1:
        return
    part.positions = lambda seq_len, device: local_positions(seq_len * size, rank, size).to(device)
    part.whole_length = lambda seq_len: seq_len * size
    for layer in part.blocks:
        layer.self_attn.attend = ContextAttention(axis.get_group())


def local_positions(seq_len: int, rank: int, size: int) -> Tensor:
    """[seq_len / size]: the positions that a rank holds."""
    pieces = torch.arange(seq_len).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


class ContextAttention:
    """Causal attention of a rank's queries to the keys and values of all ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def __call__(
        self, q_BSNH: Tensor, k_BSMH: Tensor, v_BSMV: Tensor, *, valid_BU: Tensor | None = None, **options: Any
    ) -> Tensor:
        """`causal_attention` with these options, without padding but on the right of the whole sequence."""
        if valid_BU is not None:
            raise ConfigError(
                f"attention_mask with parallel.cp ({self.size}): must be for padding on the right, with right_padded"
            )
        piece = q_BSNH.shape[1] // 2
        widths = [k_BSMH.shape[-1], v_BSMV.shape[-1]]
        k, v = self._gather(torch.cat([k_BSMH, v_BSMV], dim=-1)).split(widths, dim=-1)
        outputs = []
        for i, q in zip((self.rank, 2 * self.size - 1 - self.rank), q_BSNH.split(piece, dim=1)):
            end = (i + 1) * piece
            outputs.append(causal_attention(q, k[:, :end], v[:, :end], **options))
        return torch.cat(outputs, dim=1)

    def _gather(self, kv_BSMW: Tensor) -> Tensor:
        """The same for the whole sequence, in its order."""
        pieces = torch.stack(kv_BSMW.chunk(2, dim=1))  # the two pieces of this rank, [2, B, S/2c, M, W]
        gathered = all_gather_rows(pieces, self.group)  # piece 2r and 2r + 1 are rank r's
        first, second = gathered[0::2], gathered[1::2]
        return torch.cat([*first.unbind(0), *second.flip(0).unbind(0)], dim=1)
