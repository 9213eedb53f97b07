"""How long requests wait for an engine that takes the same time for each: the M/D/1 queue.

Requests come at random (Poisson). The mean wait is that of Pollaczek and Khinchine, as in DistServe (Zhong et al. 2024,
section 3.1); the wait that a share of them stays under takes its tail as exponential with that mean.
"""

from __future__ import annotations

from math import inf, log

ATTAINED = 0.9  # share of requests that a limit is to hold for, as DistServe has it


def mean_wait(rate: float, service: float) -> float:
    """Seconds before service begins, for `rate` requests a second that take `service` seconds each."""
    load = rate * service
    return inf if load >= 1 else load * service / (2 * (1 - load))


def wait(rate: float, service: float, share: float = ATTAINED) -> float:
    """What `share` of the requests wait at most."""
    load = rate * service
    if load >= 1:
        return inf
    if load <= 1 - share:
        return 0.0
    return mean_wait(rate, service) / load * log(load / (1 - share))


def highest_rate(service: float, patience: float, share: float = ATTAINED) -> float:
    """Requests a second of which `share` wait at most `patience` seconds."""
    if patience < 0:
        return 0.0
    low, high = 0.0, 1 / service
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if wait(middle, service, share) <= patience else (low, middle)
    return low
