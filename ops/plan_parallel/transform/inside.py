"""How the blocks of a plan are cut over its tensor-parallel ranks: what the search over operators finds for them."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from tersor.formats.errors import TersorError
from tersor.formats.hardware import Hardware
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload
from tersor.ops.plan_parallel.transform.choose import Chooser, Chosen, Device, choose
from tersor.ops.plan_parallel.transform.operators import Node, block_operators

ROOM = 1.2  # times a rank's even share of the weights: norms are whole on every rank


class Inside(NamedTuple):
    """Blocks that are cut alike: which, `[operator, annotation, along, collectives]` of each operator, and the seconds of a
    forward and backward pass of one micro-batch. `why` where no cut was found."""

    blocks: list[int]
    rows: list[list[str]]
    seconds: float = 0.0
    why: str = ""


def inside_blocks(model: PlanModel, layout: Layout, workload: Workload, links, hardware: Hardware) -> list[Inside]:
    """One entry for each kind of block; empty without tensor parallelism. `links` prices collectives (communication.links)."""
    if layout.tp == 1:
        return []
    span = links.span(layout, "tp")
    device = Device(hardware.flops(workload.precision), hardware.bytes_per_second)
    chooser = Chooser(
        layout.tp,
        lambda collective, nbytes, group: links.seconds(collective, nbytes, *span),
        device,
        layout.micro_batches(workload.global_batch),
        gradient_bytes=workload.gradient_bytes,
    )
    kinds: dict[int, list[int]] = {}
    for piece, signature in zip(model.pieces, model.signatures, strict=True):
        if piece.kind == "block":
            kinds.setdefault(signature, []).append(piece.index)
    found = []
    for blocks in kinds.values():
        piece = model.pieces[1 + blocks[0]]
        try:
            nodes = block_operators(model, piece, layout.micro_batch, workload.seq_len // layout.cp, layout.tp)
            chosen = choose(nodes, chooser, ROOM * weight_bytes(nodes) / layout.tp)
        except TersorError as error:
            found.append(Inside(blocks, [], why=str(error)))
        else:
            found.append(Inside(blocks, _rows(nodes, chosen), chosen.seconds))
    return found


def weight_bytes(nodes: tuple[Node, ...]) -> int:
    """Of all operators, in 16 bits."""
    return sum(
        2 * prod(shape)
        for node in nodes
        for name, shape in zip(node.inputs, node.shapes()[0], strict=True)
        if name in node.weights
    )


def _rows(nodes: tuple[Node, ...], chosen: Chosen) -> list[list[str]]:
    along, before = chosen.along(), {}
    for _, reader, phase, path in chosen.paths:
        words = " + ".join(path.collectives)
        if words:
            before.setdefault(reader, []).append(f"{words.replace('_', '-')} ({phase})")
    rows = [
        [node.name, node.annotation.text, along[node.name] or "not cut", ", ".join(before.get(node.name, []))]
        for node in nodes
    ]
    if "next block" in before:
        rows.append(["next block", "", "", ", ".join(before["next block"])])
    return rows
