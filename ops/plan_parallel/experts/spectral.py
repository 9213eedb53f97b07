"""A first placement of experts from the whole chain of layers at once.

The experts of all layers are the nodes of a graph, the counts of steps its edges. The leading eigenvectors of the
normalized adjacency (Ng, Jordan, Weiss 2001) put experts that follow each other at one place; k-means there, with every
layer shared evenly, gives a device to each. Improving layer by layer alone would have to find this out link by link.
"""

from __future__ import annotations

import numpy as np
from tersor.ops.plan_parallel.experts.assignment import assign_in_groups

ROUNDS = 60  # of subspace iteration: enough for a start that is improved afterwards
MEANS = 10


def spectral_start(counts: np.ndarray, devices: int, size: int, capacity: int) -> np.ndarray:
    """`counts` `[layers - 1, experts, experts]` -> device `[layers, experts]`; `size` experts stay together."""
    points = _embedding(counts, devices)
    layers, experts, _ = points.shape
    centres = _spread(points.reshape(layers * experts, -1), devices)
    device = None
    for _ in range(MEANS):
        distance = ((points[:, :, None] - centres) ** 2).sum(-1)
        found = np.stack([assign_in_groups(layer, size, capacity) for layer in distance])
        if device is not None and (found == device).all():
            break
        device = found
        centres = np.stack([points[device == one].mean(0) for one in range(devices)])
    return device


def _embedding(counts: np.ndarray, width: int) -> np.ndarray:
    """Points of unit length `[layers, experts, width]`."""
    steps, experts, _ = counts.shape
    degree = np.zeros((steps + 1, experts))
    degree[:-1] += counts.sum(2)
    degree[1:] += counts.sum(1)
    scale = 1 / np.sqrt(np.maximum(degree, 1e-12))
    links = counts * scale[:-1, :, None] * scale[1:, None, :]
    vectors = np.random.default_rng(0).standard_normal(((steps + 1) * experts, width))
    for _ in range(ROUNDS):
        vectors, _ = np.linalg.qr(vectors)
        parts = vectors.reshape(steps + 1, experts, width)
        new = parts.copy()  # plus the identity: the graph of a chain has eigenvalues of both signs
        new[1:] += links.transpose(0, 2, 1) @ parts[:-1]
        new[:-1] += links @ parts[1:]
        vectors = new.reshape(-1, width)
    points = vectors.reshape(steps + 1, experts, width)
    return points / np.maximum(np.linalg.norm(points, axis=-1, keepdims=True), 1e-12)


def _spread(points: np.ndarray, wanted: int) -> np.ndarray:
    """Centres that lie far from each other: the next one is the point farthest from those before."""
    chosen = [0]
    distance = ((points - points[0]) ** 2).sum(-1)
    while len(chosen) < wanted:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(-1))
    return points[chosen]
