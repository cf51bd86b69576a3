"""On which devices Triton kernels run, with a GPU's properties made up."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dmoe.ops import choose_backend, platform

expert_mlp = sys.modules["dmoe.ops.expert_mlp"]  # the name in dmoe.ops is the function

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of compute capability 8.0, and all that Triton needs."""
    properties = SimpleNamespace(major=8)
    monkeypatch.setattr(platform, "_known_new_enough", platform._is_new_enough)
    monkeypatch.setattr(platform, "_HAS_TRITON", True)
    monkeypatch.setattr(platform, "_HAS_COMPILER", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (properties.major, 0))
    return properties


def test_a_gpu_runs_triton_if_all_is_there(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform.runs_triton(GPU)
    for name in ("_HAS_TRITON", "_HAS_COMPILER"):
        with monkeypatch.context() as patch:
            patch.setattr(platform, name, False)
            assert not platform.runs_triton(GPU)
    gpu.major = 7
    assert not platform.runs_triton(GPU)


def test_only_compute_capability_9_is_hopper(gpu: SimpleNamespace) -> None:
    found = []
    for gpu.major in (8, 9, 10):
        found.append(platform.is_hopper(GPU))
    assert found == [False, True, False]
    assert not platform.is_hopper(torch.device("cpu"))


def test_a_cpu_runs_triton_in_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "_HAS_TRITON", True)
    monkeypatch.setattr(platform, "_HAS_COMPILER", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not platform.runs_triton(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert platform.runs_triton(torch.device("cpu"))


@pytest.mark.parametrize(
    ("dtype", "tf32", "hip", "chosen"),
    [
        (torch.bfloat16, False, None, "triton"),
        (torch.float16, False, None, "triton"),
        (torch.float32, False, None, "torch"),
        (torch.float32, True, None, "triton"),
        (torch.float64, True, None, "reference"),
        (torch.bfloat16, False, "6.0", "torch"),
    ],
)
def test_backend_chosen_on_a_gpu(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tf32: bool, hip: str | None, chosen: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(expert_mlp, "allows_tf32", lambda: tf32)
    assert choose_backend(SimpleNamespace(device=GPU, dtype=dtype)) == chosen  # type: ignore[arg-type]


def test_tf32_is_allowed_by_either_way_of_saying_so() -> None:
    """In a process of its own: torch refuses to read the older flag after the newer one was set."""
    code = """
import torch
from dmoe.ops.precision import allows_tf32
matmul = torch.backends.cuda.matmul
assert not allows_tf32()
for matmul.allow_tf32 in (True, False):
    assert allows_tf32() is matmul.allow_tf32
torch.set_float32_matmul_precision("high")
assert allows_tf32()
torch.set_float32_matmul_precision("highest")
matmul.fp32_precision = "tf32"
assert allows_tf32()
matmul.fp32_precision = "ieee"
assert not allows_tf32()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
