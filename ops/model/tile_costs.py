"""What products with sparse weights cost on a device: measured once, kept, and read off for any tensor.

PIT's idea (SOSP'23): the time of a sparse product is that of the dense tiles it is packed into, `n * cost[tile]`, and an
index cost; n counts per fibre, since packing happens within one. Both are found here by timing the kernels at a few
sparsities: between those the time is taken as linear in n, which is n times a slope plus what does not grow with n.
Weights are made up, and so is where they are not zero; time depends on neither. On a CPU the public functions of the
kernels run torch's and numba's paths, in float32, against torch's dense float32 product.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tersor import __version__
from tersor.formats.errors import TersorError
from tersor.formats.hardware import host_path
from tersor.formats.json_file import read_object
from tersor.ops.model.sparse_samples import DENSE, TILES, Kind, admits, dense_units, make
from tersor.ops.model.timer import device_label, seconds
from torch import Tensor

SCHEMA = "tersor.tile-costs/1"
KERNELS = 1  # raised with every change to the kernels that changes their times
KINDS: tuple[Kind, ...] = (
    ("sparse-24-bitmask", None),
    ("sparse-bitmask", None),
    *((format, tile) for format, tiles in TILES.items() for tile in tiles),
)
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)
ROUNDS, ENOUGH_SECONDS = 7, 4.0  # no further round once the calls of one shape took the second
Progress = Callable[[int, int], None]
Key = tuple[Kind, tuple[int, int], int]


@dataclass(frozen=True)
class Points:
    """Seconds of one kernel at one shape and number of tokens, by sparsity (of SPARSITIES, in whole tiles) and by
    dense tiles run (`units`)."""

    sparsities: tuple[float, ...]
    units: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, units: float) -> float:
        """Seconds for that many units: linear between what was measured and beyond it, never less for more units."""
        order = np.argsort(self.units, kind="stable")
        x = np.asarray(self.units, float)[order]
        y = np.maximum.accumulate(np.asarray(self.seconds, float)[order])
        inside = float(np.interp(units, x, y))
        ends = (0, 1) if units < x[0] else (-2, -1)
        if x[0] <= units <= x[-1] or len(x) < 2 or x[ends[0]] == x[ends[1]]:
            return inside
        slope = (y[ends[1]] - y[ends[0]]) / (x[ends[1]] - x[ends[0]])
        return max(float(inside + slope * (units - np.clip(units, x[0], x[-1]))), 0.0)


@dataclass
class TileCosts:
    """Seconds of products `[tokens, K] x [N, K]^T` on one device in one dtype. Shapes are those of the weight, `[N, K]`.

    device: `timer.device_label`, which begins with the type.
    """

    device: str
    dtype: str
    points: dict[Key, Points] = field(default_factory=dict)

    @classmethod
    def cached(cls, device: torch.device, dtype: torch.dtype) -> TileCosts:
        """What was measured before on this device with this version; without anything where there is no such file."""
        costs = cls(device_label(device), str(dtype).removeprefix("torch."))
        try:
            content = read_object(path(device), "measure again")
        except TersorError:
            return costs
        if [content.get(key) for key in ("schema", "tersor", "kernels", "device")] != costs._identity:
            return costs
        try:
            for entry in content["measurements"]:
                if entry["dtype"] == costs.dtype:
                    key, points = _entry(entry)
                    costs.points[key] = points
        except (KeyError, TypeError, ValueError):
            costs.points.clear()  # not written by this: measure again
        return costs

    @classmethod
    def measure(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        shapes: Iterable[tuple[int, int]],
        tokens: Sequence[int],
        kinds: Sequence[Kind] = KINDS,
        progress: Progress = lambda done, total: None,
    ) -> TileCosts:
        """The costs of these shapes at these numbers of tokens; what the cache lacks is measured and added to it.

        Raises TersorError where the result cannot be kept.
        """
        costs = cls.cached(device, dtype)
        shapes = list(dict.fromkeys(shapes))
        for done, shape in enumerate(shapes):
            progress(done, len(shapes))
            wanted = [kind for kind in ((DENSE, None), *kinds) if admits(kind, shape)]
            missing = [count for count in tokens if not all(costs.knows(kind, shape, count) for kind in wanted)]
            if missing:
                costs.points |= measure_shape(device, dtype, shape, missing, kinds)
                costs.save(device)
        progress(len(shapes), len(shapes))
        return costs

    def knows(self, kind: Kind, shape: tuple[int, int], tokens: int) -> bool:
        return (kind, shape, tokens) in self.points

    def dense_seconds(self, shape: tuple[int, int], tokens: int) -> float:
        """Raises ValueError for what was not measured."""
        return self._of((DENSE, None), shape, tokens).seconds[0]

    def seconds(
        self,
        format: str,
        tile: tuple[int, int] | None,
        shape: tuple[int, int],
        tokens: int,
        tiles_per_fibre: Tensor | Sequence[int],
    ) -> float:
        """Of a weight that stores `tiles_per_fibre` tiles (values, for formats without tiles) in its fibres.

        Raises ValueError for what was not measured.
        """
        kind, on_cpu = (format, tile), self.device.startswith("cpu ")
        return self._of(kind, shape, tokens).at(dense_units(kind, torch.as_tensor(tiles_per_fibre), on_cpu))

    def _of(self, kind: Kind, shape: tuple[int, int], tokens: int) -> Points:
        if not self.knows(kind, shape, tokens):
            raise ValueError(f"{kind[0]} was not measured for weights {list(shape)} and {tokens} tokens")
        return self.points[kind, shape, tokens]

    @property
    def _identity(self) -> list:
        return [SCHEMA, __version__, KERNELS, self.device]

    def save(self, device: torch.device) -> None:
        """Keep it beside what is known of other dtypes; the file is there whole or not at all."""
        file = path(device)
        entries = []
        try:
            content = read_object(file, "")
            if [content.get(key) for key in ("schema", "tersor", "kernels", "device")] == self._identity:
                entries = [entry for entry in content["measurements"] if entry["dtype"] != self.dtype]
        except (TersorError, KeyError, TypeError):
            pass  # nothing there to be kept
        for (kind, shape, tokens), points in self.points.items():
            entry = {"dtype": self.dtype, "format": kind[0], "tile": kind[1], "shape": shape, "tokens": tokens}
            entries.append(entry | {"points": list(zip(points.sparsities, points.units, points.seconds, strict=True))})
        content = dict(zip(("schema", "tersor", "kernels", "device"), self._identity, strict=True))
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content | {"measurements": entries}) + "\n", "utf-8")
            partial.replace(file)
        except OSError as error:
            raise TersorError(f"{file}: {error.strerror}", "choose a place that can be written to") from error


def path(device: torch.device) -> Path:
    """Where the costs of this kind of device are kept: beside `host.toml`."""
    return host_path().with_name(f"tile_costs.{device.type}.json")


def _entry(entry: dict) -> tuple[Key, Points]:
    """Raises KeyError, TypeError or ValueError for what `save` does not write."""
    kind = (entry["format"], None if entry["tile"] is None else tuple(map(int, entry["tile"])))
    rows, columns = map(int, entry["shape"])
    sparsities, units, taken = zip(*((float(s), float(n), float(t)) for s, n, t in entry["points"]), strict=True)
    if not all(np.isfinite(value) and value > 0 for value in taken):
        raise ValueError("times are positive")
    return (kind, (rows, columns), int(entry["tokens"])), Points(sparsities, units, taken)


@torch.no_grad()
def measure_shape(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: Sequence[int],
    kinds: Sequence[Kind] = KINDS,
) -> dict[Key, Points]:
    """Every kind at every sparsity, and the dense product, for one shape. A kind that does not admit it is left out."""
    ladder = [((DENSE, None), 0.0)]
    for kind in kinds:
        if admits(kind, shape):
            ladder += [(kind, sparsity) for sparsity in (SPARSITIES if kind[0] != "sparse-24-bitmask" else (0.5,))]
    products, units = [], []
    for kind, sparsity in ladder:
        sample = make(kind, shape, sparsity, dtype, device)
        products.append(sample.product)  # which keeps what the kernel reads, not the dense weight
        units.append((kind, sample.sparsity, dense_units(kind, sample.per_fibre, device.type == "cpu")))
    found: dict[Key, Points] = {}
    for count in tokens:
        x = torch.randn(count, shape[1], device=device).to(dtype)
        taken = time_calls([partial(product, x) for product in products], device)
        rows: dict[Kind, list[tuple[float, float, float]]] = {}
        for (kind, *point), time in zip(units, taken, strict=True):
            rows.setdefault(kind, []).append((*point, time))
        for kind, points in rows.items():
            found[kind, shape, count] = Points(*zip(*points, strict=True))
    return found


def time_calls(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each call, after one that compiles and does not count.

    On a CPU they take turns, so that each finds the caches full of the others' weights, as in a model, and the shortest
    counts: the rest is what else the machine did. On a GPU it is the median, with the cache emptied before every run.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return [do_bench(call, warmup=5, rep=20, return_mode="median") / 1e3 for call in calls]
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in calls]
    spent = 0.0
    for _ in range(ROUNDS):
        for call, times in zip(calls, taken, strict=True):
            times.append(seconds(call, device))
            spent += times[-1]
        if spent > ENOUGH_SECONDS:
            break
    return [min(times) for times in taken]
