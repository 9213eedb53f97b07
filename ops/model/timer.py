"""Wall-clock times of work on a device, and what they say: median and quartiles of several runs."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
CACHE_BYTES = 32 << 20  # assumed where the machine does not tell


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """One run of `work` until the device is done with it."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def spread(samples: list[float]) -> dict:
    """`seconds` (the median), quartiles and the number of runs."""
    low, middle, high = (float(value) for value in np.quantile(samples, (0.25, 0.5, 0.75)))
    return {"seconds": middle, "low_seconds": low, "high_seconds": high, "runs": len(samples)}


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory: weights that are to come from memory must be more than this."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for file in CPU_CACHES.glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KM]?)", file.read_text().strip()):
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]])
    return max(sizes, default=CACHE_BYTES)


def memory_bytes(device: torch.device) -> int:
    """All memory of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return "CPU"


def device_label(device: torch.device) -> str:
    """What measured times are true for: kept with them, so that others are measured anew."""
    threads = f" {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device.type} {device_name(device)}{threads} torch {torch.__version__}"
