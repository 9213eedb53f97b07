"""The ways to choose which weights become zero, under their names on the command line."""

from __future__ import annotations

from tersor.ops.prune.request import Request
from tersor.ops.prune.weights.magnitude import Magnitude
from tersor.ops.prune.weights.random import Random
from tersor.ops.prune.weights.ria import RIA
from tersor.ops.prune.weights.sparsegpt import SparseGPT
from tersor.ops.prune.weights.wanda import Wanda


def method(request: Request):
    """An object with `needs` (statistics) and `prune(weight, statistics, pattern, sparsity, name)`."""
    if request.method == "sparsegpt":
        return SparseGPT(request.damping)
    if request.method == "random":
        return Random(request.seed)
    return {"magnitude": Magnitude, "wanda": Wanda, "ria": RIA}[request.method]()
