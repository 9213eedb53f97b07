"""Plain loops compiled for the CPU.

What torch does in five passes over memory, or in seven calls per column of a few hundred values, numba compiles to one
pass with everything in vector registers. A loop takes numpy views of contiguous tensors and runs without Python's lock.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import torch

# Sums may be reordered and multiply-adds fused, which vector code needs; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz"}


def compiled(function: Callable) -> Callable:
    """Compile a loop on first use; the result is kept on disk where a folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")(function)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(nogil=True, fastmath=FAST, error_model="numpy")(function)


def over_rows(work: Callable[[int, int], None], rows: int, fewest: int = 64) -> None:
    """Call `work(first, last)` on runs of rows, one per thread that torch may use, at least `fewest` rows each."""
    threads = max(1, min(torch.get_num_threads(), rows // fewest))
    if threads == 1:
        work(0, rows)
        return
    cuts = [rows * part // threads for part in range(threads + 1)]
    list(_pool(threads).map(work, cuts[:-1], cuts[1:]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def array(tensor: torch.Tensor | None, dtype: torch.dtype, dimensions: int):
    """A contiguous numpy view (a copy where needed) of `tensor`; an empty array for None, which a loop sees as absent."""
    if tensor is None:
        tensor = torch.empty([0] * dimensions)
    return tensor.to(dtype).contiguous().numpy()
