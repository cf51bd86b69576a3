"""Starts a rank of test_megatron.py; what it runs is imported there, because it patches megatron-core."""

from unittest import mock


def run_rank(rank: int, folder: str) -> None:
    with mock.patch("torch.compile", lambda function, **_: function):  # megatron compiles many small functions
        import megatron_worker

    megatron_worker.rank_main(rank, 2, folder)
