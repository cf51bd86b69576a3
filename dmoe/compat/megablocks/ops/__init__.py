"""`megablocks.ops`: sorting, counting and moving rows, on CPU and GPU.

An index, or pick, is token * top_k + k; `bins` are running sums of the tokens of each expert. Each name is a function,
and the file of that name a module (`from megablocks.ops.sort import sort`), as in MegaBlocks. `docs/megablocks.md` says
where results differ.
"""

from dmoe.compat.megablocks.ops.binned_gather import binned_gather
from dmoe.compat.megablocks.ops.binned_scatter import binned_scatter
from dmoe.compat.megablocks.ops.cumsum import exclusive_cumsum, inclusive_cumsum
from dmoe.compat.megablocks.ops.gather import gather
from dmoe.compat.megablocks.ops.histogram import histogram
from dmoe.compat.megablocks.ops.padded_gather import padded_gather
from dmoe.compat.megablocks.ops.padded_scatter import padded_scatter
from dmoe.compat.megablocks.ops.repeat import repeat
from dmoe.compat.megablocks.ops.replicate import replicate
from dmoe.compat.megablocks.ops.round_up import round_up
from dmoe.compat.megablocks.ops.scatter import scatter
from dmoe.compat.megablocks.ops.sort import sort
from dmoe.compat.megablocks.ops.sum import sum
from dmoe.compat.megablocks.ops.topology import topology

__all__ = [
    "binned_gather",
    "binned_scatter",
    "exclusive_cumsum",
    "gather",
    "histogram",
    "inclusive_cumsum",
    "padded_gather",
    "padded_scatter",
    "repeat",
    "replicate",
    "round_up",
    "scatter",
    "sort",
    "sum",
    "topology",
]
