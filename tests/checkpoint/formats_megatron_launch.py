"""Starts a rank of test_formats_megatron_core.py; what it runs is imported there, because it patches megatron-core."""

import sys
from pathlib import Path
from unittest import mock

import torch


def run_rank(rank: int, folder: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
    with mock.patch("torch.compile", lambda function, **_: function):  # megatron compiles many small functions
        import formats_megatron_worker

    torch.set_num_threads(1)
    formats_megatron_worker.rank_main(rank, 2, folder)
