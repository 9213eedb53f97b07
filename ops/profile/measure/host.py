"""What this machine can do: matmul peaks and memory bandwidth, measured once and kept as hardware `host`.

A peak is the best of a few sizes and runs, so efficiencies are 1: predictions for `host` are of what was reached here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tersor.formats.errors import TersorError
from tersor.formats.hardware import HOST, Hardware, host_path, load_hardware, save_hardware
from tersor.ops.model.bare import free_bytes
from tersor.ops.model.timer import cache_bytes, device_label, device_name, memory_bytes, seconds

SECONDS_EACH = 0.4  # spent on one figure
LEAST_BYTES = 256 << 20  # of a buffer that is read
SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
ON_CPU = ("fp32", "bf16", "int8")


def host(device: torch.device) -> tuple[Hardware, bool]:
    """The hardware `host` for `device`, and whether it was measured just now instead of read back.

    Raises TersorError where the result cannot be kept.
    """
    try:
        known = load_hardware(HOST)
        if known.notes.get("device") == device_label(device):
            return known, False
    except TersorError:
        pass  # not there, or of another version: measure
    found = measure_host(device)
    save_hardware(found, host_path())
    return found, True


@torch.no_grad()
def measure_host(device: torch.device) -> Hardware:
    peaks = {name: peak for name in DTYPES if (peak := _matmul_peak(name, device))}
    read, copy = _bandwidths(device)
    return Hardware(
        name=f"{device_name(device)}" + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""),
        peak_flops=peaks,
        memory_bytes=memory_bytes(device),
        memory_gbps=read,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        kernel_floor_seconds=_kernel_floor(device),
        notes={
            "device": device_label(device),
            "copy_gbps": f"{copy:.3g}",
            "source": "measured by tersor profile --measure; memory_gbps is of reading",
        },
    )


def _best(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of as many runs as fit, after one that does not count."""
    seconds(work, device)
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 3 or spent < SECONDS_EACH:
        took = seconds(work, device)
        best, spent, runs = min(best, took), spent + took, runs + 1
    return best


def _matmul_peak(name: str, device: torch.device) -> float | None:
    """FLOP/s of square matrix products, None for a dtype that torch does not multiply here."""
    if device.type == "cpu" and name not in ON_CPU:
        return None
    peak = 0.0
    for size in SIZES[device.type]:
        if name == "int8":
            a = torch.randint(-8, 8, (size, size), dtype=torch.int8, device=device)
            b = torch.randint(-8, 8, (size, size), dtype=torch.int8, device=device).T
            work = lambda a=a, b=b: torch._int_mm(a, b)  # noqa: E731
        else:
            a = torch.randn(size, size, device=device).to(DTYPES[name])
            b = torch.randn(size, size, device=device).to(DTYPES[name])
            out = torch.empty_like(a)
            work = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)  # noqa: E731
        try:
            peak = max(peak, 2 * size**3 / _best(work, device))
        except (RuntimeError, AttributeError):
            return None
    return peak


def _bandwidths(device: torch.device) -> tuple[float, float]:
    """(reading, copying) in 10^9 bytes a second, of buffers that no cache holds. A copy counts what it reads and writes.

    Reading is a matrix times a vector, which is what a step of decoding does with every weight.
    """
    nbytes = min(max(8 * cache_bytes(device), LEAST_BYTES), free_bytes(device) // 4)
    buffer = torch.ones(nbytes // 4 // 4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    read = buffer.nbytes / _best(lambda: torch.mv(buffer, vector), device)
    target = torch.empty_like(buffer)
    copy = 2 * buffer.nbytes / _best(lambda: target.copy_(buffer), device)
    return read / 1e9, copy / 1e9


def _kernel_floor(device: torch.device) -> float:
    """What one small operator takes, started from Python as transformers does."""
    x = torch.ones(64, device=device)
    calls = 200

    def many() -> None:
        for _ in range(calls):
            torch.add(x, x)

    return _best(many, device) / calls
