"""Settings every test shares: few threads, and a fixed seed before each test."""

import os

# Before torch loads: a spinning OpenMP thread takes the core that another test process needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "2")
# No pool of compiler processes, each of which would import torch first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed the three default generators; a test that needs a generator of its own can build it from the value."""
    value = 1234
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value
