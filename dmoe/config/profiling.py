"""What watches a run: traces, timelines, memory, the routing, and hangs."""

from __future__ import annotations

from dataclasses import dataclass

from dmoe.config.checks import require, require_not_negative, require_positive, require_types


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """Tools that look at the steps of a run; all that cost time are off unless asked for. See docs/debugging.md."""

    trace: bool = False
    """Record steps with torch's profiler: a Chrome trace and tables of operators for each rank."""
    trace_wait: int = 5
    """Steps of this process before the profiler is warmed up."""
    trace_warmup: int = 2
    """Steps whose records are thrown away, because a profiler that starts is slow."""
    trace_active: int = 3
    """Steps that are recorded."""
    trace_repeat: int = 1
    """How often wait, warm-up and recording are gone through. 0: to the end of the run."""
    trace_stacks: bool = False
    """Record the Python stack of each operator too."""
    timeline: bool = False
    """Time the parts of each step (data, forward, backward, routing, exchange, experts, optimiser) on each rank, and
    name ranks that keep the others waiting."""
    memory: bool = False
    """Account for the memory of a step by what it is for, and compare the peak with the estimate of a dry run. On CUDA
    the allocator's history is kept too, and written when memory runs out."""
    memory_every: int = 0
    """Steps between accounts of the memory. 0: one, of the third step of this process."""
    routing: bool = True
    """At each validation keep how a fixed piece of the held-out text is routed, for the report."""
    routing_tokens: int = 2048
    """Tokens of that piece, at most."""
    hang_timeout: float = 300.0
    """Seconds in which no part of a step begins or ends, after which every rank writes its stack and its last
    collectives for `dmoe doctor RUN`. Less than parallel.timeout_seconds, which ends the run. 0: never."""
    hang_abort: bool = False
    """End the process then, so that a cluster job does not wait for ever. Not one that a debugger has stopped."""
    explain_non_finite: bool = True
    """When a loss or gradient is not finite, run the step again to find the rank and the module where it began."""

    def __post_init__(self) -> None:
        require_types(self, "profiling")
        require_positive(self, "profiling", "trace_active", "routing_tokens")
        require_not_negative(
            self, "profiling", "trace_wait", "trace_warmup", "trace_repeat", "memory_every", "hang_timeout"
        )
        require(
            not self.trace or self.trace_warmup > 0,
            "profiling.trace_warmup", self.trace_warmup, "at least 1 with profiling.trace",
        )  # fmt: skip
