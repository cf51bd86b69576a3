"""The state of every random generator a step may draw from, as tensors."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch

from dmoe.checkpoint import ranks


def capture_rng() -> dict[str, dict[str, torch.Tensor]]:
    """State of the random generators of this process, for the "rng" section of a checkpoint.

    One entry, named after the rank ("rank0"), with CPU tensors: "torch" (uint8), "cuda" (uint8, the current device,
    if CUDA is available), and for `numpy.random` and `random` the integers (int64) and the pending normal deviate
    (float64, nan for none).
    """
    _, keys, position, has_gauss, gauss = np.random.get_state()
    _, words, python_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), int(position)]),
        "numpy_gauss": _gauss_tensor(float(gauss) if has_gauss else None),
        "python": torch.tensor(words),
        "python_gauss": _gauss_tensor(python_gauss),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {_owner(): state}


def restore_rng(rng: dict[str, Any]) -> list[str]:
    """Set the generators to what `capture_rng` returned.

    Returns the names of the generators for which `rng` has no state, which stay as they are: after a run moved to
    more ranks or to a GPU.
    """
    state: dict[str, torch.Tensor] = rng.get(_owner(), {})
    if "torch" in state:
        torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state and "numpy_gauss" in state:
        *keys, position = state["numpy"].tolist()
        gauss = _gauss_value(state["numpy_gauss"])
        array = np.array(keys, dtype=np.uint32)
        np.random.set_state(("MT19937", array, position, int(gauss is not None), gauss or 0.0))
    if "python" in state and "python_gauss" in state:
        random.setstate((3, tuple(state["python"].tolist()), _gauss_value(state["python_gauss"])))
    expected = ["torch", "numpy", "python"]
    if torch.cuda.is_available():
        expected.append("cuda")
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu())
    return [name for name in expected if name not in state]


def _owner() -> str:
    return f"rank{ranks.rank()}"


def _gauss_tensor(value: float | None) -> torch.Tensor:
    return torch.tensor([math.nan if value is None else value], dtype=torch.float64)


def _gauss_value(tensor: torch.Tensor) -> float | None:
    value = float(tensor.item())
    return None if math.isnan(value) else value
