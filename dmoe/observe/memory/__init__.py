"""The memory of a training step: what it is for, when, and against the estimate of a dry run.

`accounting`     follows every storage of a step, on real or fake tensors
`account`        sums up what was seen, by category, phase and time
`watch`          the tool of a run: accounts, files, pictures; `failure` and `cuda_history` when memory runs out
"""

from dmoe.observe.memory.watch import MemoryWatch

__all__ = ["MemoryWatch"]
