"""Samplers: pure in (seed, step), an epoch visits each window once, ranks partition the batch."""

import numpy as np
import pytest
import torch

from dmoe.data import WindowSampler, gather_windows, sequential_windows
from dmoe.errors import ConfigError

SIZES = [(5, 4), (7, 4), (8, 4), (9, 4), (103, 4), (1000, 7), (50, 1), (2, 1)]


@pytest.mark.parametrize(("num_tokens", "seq_len"), SIZES)
def test_epoch_visits_every_window_once(num_tokens, seq_len):
    sampler = WindowSampler(num_tokens, seq_len, seed=3)
    windows = sampler.windows_per_epoch
    for epoch in range(5):
        starts = np.sort(np.concatenate([sampler.window_starts(epoch * windows + i, 1) for i in range(windows)]))
        shift = starts[0]
        assert 0 <= shift < seq_len
        assert starts.tolist() == [shift + i * seq_len for i in range(windows)]
        assert starts[-1] + seq_len <= num_tokens - 1
        targets = {s + t for s in starts.tolist() for t in range(1, seq_len + 1)}
        assert len(targets) == windows * seq_len
        assert num_tokens - len(targets) < 2 * seq_len + (seq_len == 1)


def test_shift_and_order_change_from_epoch_to_epoch_and_with_the_seed():
    sampler = WindowSampler(10_000, 16, seed=0)
    epochs = [sampler.epoch_starts(e) for e in range(40)]
    shifts = {int(starts.min()) for starts in epochs}
    assert len(shifts) > 10
    assert shifts <= set(range(16))
    orders = {tuple((starts // 16).tolist()) for starts in epochs}
    assert len(orders) == 40
    assert not np.array_equal(np.sort(epochs[0]), epochs[0])
    assert not np.array_equal(WindowSampler(10_000, 16, seed=1).epoch_starts(0), epochs[0])


def test_order_is_a_fixed_function_of_the_seed():
    # A change of these numbers breaks the resumption of every run made before.
    assert WindowSampler(40, 4, seed=7).window_starts(0, 9).tolist() == [30, 14, 10, 22, 6, 2, 18, 34, 26]
    assert WindowSampler(40, 4, seed=7).window_starts(3, 3).tolist() == [26, 34, 22]


def test_batches_are_pure_and_wrap_exactly():
    sampler = WindowSampler(103, 4, seed=5)
    windows = sampler.windows_per_epoch
    assert windows == 24
    stream = np.concatenate([sampler.epoch_starts(e) for e in range(12)])
    for step in (20, 0, 3, 20, 1):  # any order, a new sampler each time
        for batch_size in (1, 7, 10):
            expected = stream[step * batch_size : (step + 1) * batch_size]
            assert WindowSampler(103, 4, seed=5).window_starts(step, batch_size).tolist() == expected.tolist()
    many = sampler.window_starts(1, 60)  # one batch that spans four epochs
    assert many.tolist() == stream[60:120].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_partition_the_batch(world_size):
    sampler = WindowSampler(500, 8, seed=2)
    for step in (0, 9, 10, 33):
        parts = [sampler.rank_starts(step, 12, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in parts} == {12 // world_size}
        assert np.concatenate(parts).tolist() == sampler.window_starts(step, 12).tolist()


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match=r"train\.seq_len is 8: must be between 1 and 7, .*8 tokens"):
        WindowSampler(8, 8, seed=0)
    with pytest.raises(ConfigError, match=r"train\.batch_size is 10: must be divisible .*\(4\)"):
        WindowSampler(100, 8, seed=0).rank_starts(0, 10, 0, 4)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_gather_windows_shifts_targets_by_one(dtype, tmp_path):
    values = (np.arange(200) * 331 % 65000).astype(dtype)
    values.tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", dtype=dtype, mode="r")
    starts = WindowSampler(200, 6, seed=1).window_starts(2, 5)
    inputs, targets = gather_windows(tokens, starts, 6)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (5, 6)
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    for row, start in enumerate(starts.tolist()):
        assert inputs[row].tolist() == values[start : start + 6].tolist()
        assert targets[row].tolist() == values[start + 1 : start + 7].tolist()


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 8, 9, 10, 16, 17, 100])
def test_sequential_windows_score_every_token_but_the_first_once(num_tokens):
    windows = sequential_windows(num_tokens, 8)
    scored = [start + t for start, length in windows for t in range(1, length + 1)]
    assert scored == list(range(1, num_tokens))
    assert all(length == 8 for _, length in windows[:-1])
    tokens = np.arange(num_tokens, dtype=np.uint16)
    for start, length in windows:
        inputs, targets = gather_windows(tokens, np.array([start]), length)
        assert targets[0].tolist() == [i + 1 for i in inputs[0].tolist()]
