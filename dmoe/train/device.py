"""Where a run computes: device, precision, peak speed, memory."""

from __future__ import annotations

import contextlib
import sys
import time

import torch

from dmoe.config import TrainConfig
from dmoe.errors import ConfigError

# Dense bf16 peak in TFLOP/s without sparsity, from NVIDIA's data sheets.
# By a word of the device's name. PCIe cards are slower than their SXM namesakes: those, and fp32 runs, are measured.
_PEAK_BF16 = {
    "H100": 989.0, "H200": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0
}  # fmt: skip


def resolve_device(name: str, option: str = "train.device") -> torch.device:
    """ "auto" is the first GPU, or the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'{option} is {name!r}: must be "auto", "cpu", "cuda" or "cuda:N"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{option} is {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def rank_device(name: str, local_rank: int) -> torch.device:
    """Device of one of several ranks on this machine: "auto" and "cuda" are the GPU with its number, or the CPU."""
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ConfigError(f'train.device is {name!r} with several ranks: must be "auto", "cpu" or "cuda"')
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(f"LOCAL_RANK is {local_rank}: must be less than the {count} GPUs of this machine")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware there; emulated ones are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
        return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The autocast context of `train.precision`."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def peak_tflops(config: TrainConfig, device: torch.device) -> float:
    """Peak TFLOP/s for MFU: the config's, a known GPU's data sheet, or else what a large matrix product reaches."""
    if config.peak_tflops:
        return config.peak_tflops
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        words = name.replace("-", " ").split()
        for key, peak in _PEAK_BF16.items():
            if key in words and "PCIe" not in words and autocast(config, device)._enabled:
                return peak
    return _measured_tflops(device, torch.bfloat16 if autocast(config, device)._enabled else torch.float32)


def _measured_tflops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    # A generator of its own: measuring must not move the random state that a checkpoint restored.
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
