"""How a run is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dmoe.config.checks import require, require_not_negative, require_positive, require_types

Schedule = Literal[
    "gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"
]  # fmt: skip
SINGLE_STAGE_SCHEDULES = ("gpipe", "1f1b")
V_SCHEDULES = ("zbv", "dualpipev")
SPLIT_BACKWARD_SCHEDULES = ("interleaved_zero_bubble", "zbv", "dualpipev")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over ranks. Their number is pp x dp_replicate x dp_shard x cp x tp.

    The numbers of a run do not depend on this section: only their rounding and the time do.
    """

    dp_replicate: int = 1
    """Copies of the (sharded) model; gradients are summed over them. With dp_shard > 1 this is HSDP."""
    dp_shard: int = -1
    """Ranks that a copy is sharded over with FSDP. -1: what the other axes leave."""
    cp: int = 1
    """Ranks that a sequence is split over (context parallel). FSDP also shards over them."""
    tp: int = 1
    """Ranks that attention heads, widths and the vocabulary are split over (tensor parallel)."""
    ep: int = 1
    """Ranks that the experts are spread over; divides dp_shard x cp x tp. 1: tp splits the experts' width instead."""
    pp: int = 1
    """Ranks that the layers are spread over (pipeline parallel)."""
    sequence_parallel: bool = True
    """With tp: split activations between the layers along the sequence."""
    loss_parallel: bool = True
    """With tp: never assemble the logits of the whole vocabulary on a rank."""
    reshard_after_forward: bool = True
    """With FSDP: free a layer's gathered weights after its forward and gather them again for the backward. Pipeline
    schedules that split the backward keep them. Embeddings, head and last norm are kept without a pipeline."""
    schedule: Schedule = "1f1b"
    """Pipeline schedule. Several stages a rank: interleaved_1f1b, looped_bfs, interleaved_zero_bubble; two in the shape
    of a V: zbv, dualpipev."""
    stages_per_rank: int = 0
    """Pipeline stages a rank holds. 0: what the schedule needs, 1 or 2."""
    exchange: Literal["same", "bf16", "fp8"] = "same"
    """What expert parallelism sends: activations as they are, in bf16, or in fp8 (e4m3, a scale a row; gradients
    and results bf16)."""
    ep_sends: Literal["picks", "tokens"] = "picks"
    """What travels to the ranks of the experts: "picks", a row for each, with the bits of one rank; or "tokens", one
    row to each rank that has experts of the token, which sends less the fewer the ranks and rounds otherwise."""
    max_rows: int = 0
    """With ep: most rows a rank takes in at once; a rank that more are sent to works in chunks. 0: no bound."""
    timeout_seconds: float = 600.0
    """A collective that waits longer ends the run with an error."""

    def __post_init__(self) -> None:
        require_types(self, "parallel")
        require_positive(self, "parallel", "dp_replicate", "cp", "tp", "ep", "pp", "timeout_seconds")
        require_not_negative(self, "parallel", "stages_per_rank", "max_rows")
        require(self.dp_shard == -1 or self.dp_shard > 0, "parallel.dp_shard", self.dp_shard, "greater than 0, or -1")
        require(
            self.ep_sends == "picks" or self.max_rows == 0,
            "parallel.max_rows", self.max_rows, '0 with parallel.ep_sends "tokens"',
        )  # fmt: skip
        stages, kind = self.num_local_stages, f'parallel.schedule "{self.schedule}"'
        if self.schedule in SINGLE_STAGE_SCHEDULES:
            require(stages == 1, "parallel.stages_per_rank", stages, f"1 with {kind}")
        elif self.schedule in V_SCHEDULES:
            require(stages == 2, "parallel.stages_per_rank", stages, f"2 with {kind}")
        else:
            require(stages > 1, "parallel.stages_per_rank", stages, f"2 or more with {kind}")

    @property
    def num_local_stages(self) -> int:
        """Pipeline stages of a rank."""
        return self.stages_per_rank or (1 if self.schedule in SINGLE_STAGE_SCHEDULES else 2)
