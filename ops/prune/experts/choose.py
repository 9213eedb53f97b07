"""Which experts stay, and which of the others are merged into them."""

from __future__ import annotations

import random

import torch


def by_score(scores: torch.Tensor, kept: int) -> list[int]:
    """The `kept` experts with the highest scores `[experts]`, in order; the first of equals."""
    order = sorted(range(len(scores)), key=lambda expert: (-float(scores[expert]), expert))
    return sorted(order[:kept])


def at_random(experts: int, kept: int, seed: int, layer: int) -> list[int]:
    """The control: every choice is as likely as any other."""
    return sorted(random.Random(f"{seed}:{layer}").sample(range(experts), kept))


def merge_groups(similarity: torch.Tensor, kept: list[int]) -> dict[int, list[int]]:
    """Each dropped expert joins the kept one with the most similar outputs `[experts, experts]`: kept -> joined.

    After M-SMoE (Li et al. 2024, "Merge, then compress"): the dominant experts are the centres. There the router goes on
    to tell the members of a group apart; here the centre keeps its row and the others lose theirs, so that the file is
    an ordinary smaller model. Neurons are averaged in the order they are stored.
    """
    groups: dict[int, list[int]] = {}
    for expert in range(len(similarity)):
        if expert not in kept:
            nearest = max(kept, key=lambda centre: (float(similarity[expert, centre]), -centre))
            groups.setdefault(nearest, []).append(expert)
    return groups


def average_shares(tokens: torch.Tensor, groups: dict[int, list[int]]) -> dict[int, float]:
    """Weight of each expert in its group's average: its share of the tokens routed to the group.

    A group that no token reached keeps its centre as it is.
    """
    shares: dict[int, float] = {}
    for centre, others in groups.items():
        total = sum(int(tokens[expert]) for expert in (centre, *others))
        for expert in (centre, *others):
            shares[expert] = int(tokens[expert]) / total if total else float(expert == centre)
    return shares
