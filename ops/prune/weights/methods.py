"""The ways to choose which weights become zero, under their names on the command line."""

from __future__ import annotations

from tersor.ops.prune.request import Request
from tersor.ops.prune.weights.magnitude import Magnitude
from tersor.ops.prune.weights.plan import DATA_FREE
from tersor.ops.prune.weights.random import Random
from tersor.ops.prune.weights.repair import Repaired
from tersor.ops.prune.weights.ria import RIA
from tersor.ops.prune.weights.sparsegpt import SparseGPT
from tersor.ops.prune.weights.wanda import Wanda

SCORES = {"magnitude": Magnitude, "wanda": Wanda, "ria": RIA}


def method(request: Request):
    """An object with `needs` (statistics) and `prune(weight, statistics, pattern, sparsity, name)`."""
    if request.method == "random":
        return Random(request.seed)
    chosen = SparseGPT(request.damping) if request.method == "sparsegpt" else SCORES[request.method]()
    return Repaired(chosen, request.damping) if request.repair and request.method not in DATA_FREE else chosen
