"""Which tokens go into which batch: pure functions of (seed, step), so resuming needs no sampler state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from dmoe.errors import ConfigError


class WindowSampler:
    """Shuffled windows of `seq_len` + 1 tokens: `seq_len` inputs and the same tokens shifted by one as targets.

    In every epoch window i covers tokens [i * seq_len + shift, i * seq_len + shift + seq_len], both ends included, so
    neighbours share one token and no target is used twice. `shift` is drawn once an epoch from [0, seq_len) and moves
    the cuts; the windows are visited in an order drawn once an epoch. The number of windows is the same at every shift;
    the fewer than 2 * seq_len tokens left at the two ends differ from epoch to epoch. (A corpus shorter than
    2 * seq_len tokens is one window, with a shift as far as it fits.)

    Sample number n = step * batch_size + j belongs to epoch n // windows_per_epoch. Nothing depends on earlier calls
    or on the number of ranks.

    Raises:
        ConfigError: the tokens do not fill one window.
    """

    def __init__(self, num_tokens: int, seq_len: int, seed: int) -> None:
        if seq_len < 1 or num_tokens < seq_len + 1:
            raise ConfigError(
                f"train.seq_len is {seq_len}: must be between 1 and {max(num_tokens - 1, 1)}, "
                f"because the training text has {num_tokens} tokens and a window takes seq_len + 1"
            )
        self.num_tokens = num_tokens
        self.seq_len = seq_len
        self.seed = seed
        self.windows_per_epoch = max(1, (num_tokens - seq_len) // seq_len)

    def epoch_starts(self, epoch: int) -> np.ndarray:
        """First token of each window of an epoch, in the order of visiting: int64 [windows_per_epoch], read-only."""
        return _epoch_starts(self.seed, epoch, self.num_tokens, self.seq_len, self.windows_per_epoch)

    def window_starts(self, step: int, batch_size: int) -> np.ndarray:
        """First tokens of the global batch of `step` (from 0): int64 [batch_size]."""
        samples = np.arange(batch_size, dtype=np.int64) + step * batch_size
        epochs, indices = np.divmod(samples, self.windows_per_epoch)
        starts = np.empty(batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            starts[chosen] = self.epoch_starts(int(epoch))[indices[chosen]]
        return starts

    def rank_starts(self, step: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
        """The contiguous part of `window_starts(step, batch_size)` of one data-parallel rank: int64.

        Raises:
            ConfigError: `batch_size` does not divide by `world_size`.
        """
        if batch_size % world_size:
            raise ConfigError(
                f"train.batch_size is {batch_size}: "
                f"must be divisible by the number of data-parallel ranks ({world_size})"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}: must be in [0, {world_size})")
        share = batch_size // world_size
        return self.window_starts(step, batch_size)[rank * share : (rank + 1) * share]


@lru_cache(maxsize=4)
def _epoch_starts(seed: int, epoch: int, num_tokens: int, seq_len: int, num_windows: int) -> np.ndarray:
    # Raw Philox words are the same in every numpy release, which Generator.permutation does not promise. A resumed
    # run must see the same order, so the permutation is the stable argsort of raw words.
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch)))
    num_shifts = min(seq_len, num_tokens - num_windows * seq_len)
    shift = int(bits.random_raw(1)[0]) % num_shifts
    order = np.argsort(bits.random_raw(num_windows), kind="stable").astype(np.int64)
    starts = order * seq_len + shift
    starts.flags.writeable = False  # the cache hands out this very array
    return starts


def gather_windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the windows that begin at `starts` (int [B]) from `tokens` (unsigned integers [N], may be a memory map).

    Returns:
        (inputs, targets): int64 tensors [B, seq_len] on the CPU; targets[b, t] is the token after inputs[b, t].
    """
    index = np.asarray(starts, dtype=np.int64)[:, None] + np.arange(seq_len + 1, dtype=np.int64)
    windows = torch.from_numpy(np.asarray(tokens[index], dtype=np.int64))  # shape: [B, S + 1]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def sequential_windows(num_tokens: int, seq_len: int) -> list[tuple[int, int]]:
    """(start, length) of the windows of a validation: every token but the first is a target exactly once.

    A window reads tokens [start, start + length], both ends included; its targets are the last `length` of them.
    Every length is `seq_len`, except that the last window holds what is left and may be shorter: it is neither padded
    nor dropped, and `gather_windows(tokens, [start], length)` reads it. Fewer than two tokens make no window.
    """
    return [(start, min(seq_len, num_tokens - 1 - start)) for start in range(0, num_tokens - 1, seq_len)]
