"""A checkpoint whose experts stand in another order, and which computes the same.

An expert's place in the file is its row of the router: numbered experts change their numbers, experts in one tensor their
place along its first dimension, and the router's rows, biases and correction biases move with them. What a token is sent
to, and with which weight, stays as it was; only the order in which the experts' outputs are added up may change. Bytes
are moved as they are stored, so that quantized experts take their codes and scales along.

A router that first chooses among groups of neighbouring experts (DeepSeek's n_group and topk_group) scores a group by
its members: there an order may move whole groups, and experts inside their group, and nothing else.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tersor.formats.errors import TersorError
from tersor.formats.header import FLOAT_DTYPES, TensorInfo
from tersor.formats.writer import COPY_BYTES, CheckpointWriter, writing
from tersor.ops.model.operators import kind_of
from tersor.ops.model.stored import Stored, place_of
from tersor.ops.plan_parallel.model import PlanModel

NUMBER = re.compile(r"(?<=\bexperts\.)(\d+)(?=\.)")
CORRECTION = re.compile(r"correction_bias$")
KEPT_FILES = ("config.json", "quantize_config.json")  # name no single expert (checked), so they stay byte for byte
GROUP_KEYS = (("n_group", "topk_group"), ("num_expert_group", "topk_expert_group"))


@dataclass
class Mixture:
    """The tensors of the file that belong to experts, of one block. `module` is the path of the block's experts."""

    block: int
    module: str
    numbered: dict[str, int] = field(default_factory=dict)  # name -> expert
    stacked: set[str] = field(default_factory=set)  # first dimension is the experts', or theirs times the rows
    router: set[str] = field(default_factory=set)  # first dimension is the experts'


def router_groups(config: dict) -> int:
    """How many groups of experts the router chooses among first; 1 where it does not."""
    inner = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), config)
    for groups, chosen in GROUP_KEYS:
        count, taken = inner.get(groups), inner.get(chosen)
        if isinstance(count, int) and isinstance(taken, int) and 1 <= taken < count:
            return count
    return 1


def mixtures(model: PlanModel) -> list[Mixture]:
    """In the order of the blocks. Raises TersorError for a model without experts, or whose experts cannot be told apart."""
    facts, checkpoint = model.facts, model.checkpoint
    if not facts.experts:
        raise TersorError(f"{checkpoint.path}: has no experts", "only mixtures of experts have an order to choose")
    found: dict[int, Mixture] = {}
    others: list[TensorInfo] = []
    for name, info in checkpoint.tensors.items():
        place = place_of(name)
        if place is None or place.blocks != facts.block_prefix or place.index >= facts.layers:
            continue
        kind = kind_of(name, Stored(info.shape, 0, 0, "", place=place), facts)
        if kind == "experts":
            module = name[: NUMBER.search(name).start() - 1] if place.numbered else name.rpartition(".")[0]
            mixture = found.setdefault(place.index, Mixture(place.index, module))
            if place.numbered:
                mixture.numbered[name] = int(NUMBER.search(name)[0])
            else:
                mixture.stacked.add(name)
        elif (kind == "router" and "shared_expert" not in name) or CORRECTION.search(name):
            others.append(info)
    for info in others:
        if (mixture := found.get(place_of(info.name).index)) is not None:
            mixture.router.add(info.name)
    for mixture in found.values():
        _check(model, mixture)
    return [found[block] for block in sorted(found)]


def _check(model: PlanModel, mixture: Mixture) -> None:
    checkpoint, experts = model.checkpoint, model.facts.experts
    if not any(name.endswith("weight") for name in mixture.router):
        raise TersorError(f"{mixture.module}: no router was found beside these experts", "this model is not supported")
    present = set(mixture.numbered.values())
    if present and present != set(range(experts)):
        lacking = next(
            expert for expert in range(max(experts, max(present) + 1)) if (expert in present) != (expert < experts)
        )
        raise TersorError(
            f"{mixture.module}: expert {lacking} is {'missing' if lacking < experts else 'one too many'}",
            f"config.json says {experts} experts",
        )
    for name in (*mixture.stacked, *mixture.router):
        info = checkpoint.tensors[name]
        whole = name in mixture.router
        if not info.shape or info.shape[0] % experts or (whole and info.shape[0] != experts):
            raise TersorError(
                f"tensor {name!r} of shape {list(info.shape)} has no dimension for {experts} experts in front",
                "tersor convert --to dense first",
            )
        if whole and info.dtype not in FLOAT_DTYPES and not name.endswith(("weight", "weight_packed")):
            raise TersorError(
                f"tensor {name!r} of {info.dtype} sends tokens to experts by a table", "experts cannot be reordered"
            )


class Permuted:
    """`model` with other orders. `orders[l][position]` is the expert of the source that stands there.

    `source` maps each tensor of the result to the tensor that its bytes come from; those in `moved` come in pieces, one an
    expert, in the order given there.
    """

    def __init__(self, model: PlanModel, orders: Sequence[Sequence[int]]):
        """Raises TersorError for an order that is none, or that a router with groups would not survive."""
        self.model, self.checkpoint = model, model.checkpoint
        self.mixtures = mixtures(model)
        self._refuse()
        experts, groups = model.facts.experts, router_groups(self.checkpoint.config or {})
        if len(orders) != len(self.mixtures):
            raise TersorError(
                f"orders for {len(orders)} mixtures of experts, the model has {len(self.mixtures)}",
                "give the routing of this model",
            )
        renamed: dict[str, str] = {}
        self.moved: dict[str, list[int]] = {}
        for mixture, order in zip(self.mixtures, orders, strict=True):
            check_order(mixture.module, order, experts, groups)
            place = {expert: position for position, expert in enumerate(order)}
            renamed |= {
                name: NUMBER.sub(str(place[expert]), name, count=1) for name, expert in mixture.numbered.items()
            }
            self.moved |= {name: list(order) for name in (*mixture.stacked, *mixture.router)}
        self.source = {renamed.get(name, name): name for name in self.checkpoint.tensors}

    def _refuse(self) -> None:
        path = self.checkpoint.path
        if self.checkpoint.packed or any((path / file).exists() for file in ("lowrank.json", "sparse.json")):
            raise TersorError(
                f"{path}: packed or factored weights are listed by name in a file beside them",
                "tersor convert --to dense first",
            )
        settings = (self.checkpoint.config or {}).get("quantization_config")
        if re.search(r"experts\W+\d", str(settings)):
            raise TersorError(
                f"{path}: config.json treats single experts apart (quantization_config)",
                "tersor convert --to dense first",
            )

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """In the order of the source, as the writer wants it."""
        found = {}
        for name in self.checkpoint.tensors:  # names change only among themselves
            info = self.checkpoint.tensors[self.source[name]]
            found[name] = (info.dtype, info.shape)
        return found

    def pieces(self, name: str) -> list[tuple[int, int]]:
        """(offset, bytes) in the source's file of what makes up tensor `name` of the result, in its order."""
        info = self.checkpoint.tensors[self.source[name]]
        order = self.moved.get(name)
        if order is None:
            return [(info.offset, info.nbytes)]
        each = info.nbytes // len(order)
        return [(info.offset + expert * each, each) for expert in order]

    def write(self, output: Path, key: dict | None = None) -> None:
        """The whole checkpoint, in bounded memory; `output` is there complete or not at all."""
        writer = CheckpointWriter(output, self.layout(), key or {})
        with writing(writer):
            buffer = memoryview(bytearray(COPY_BYTES))
            for name in self.source:
                self._copy(name, writer, buffer)
            for file in KEPT_FILES:
                if (self.checkpoint.path / file).is_file():
                    shutil.copyfile(self.checkpoint.path / file, writer.partial / file)
            writer.copy_side_files(self.checkpoint)
            writer.commit()

    def _copy(self, name: str, writer: CheckpointWriter, buffer: memoryview) -> None:
        file, done = self.checkpoint.tensors[self.source[name]].file, 0
        for offset, nbytes in self.pieces(name):
            for start in range(0, nbytes, len(buffer)):
                view = buffer[: min(len(buffer), nbytes - start)]
                self.checkpoint.read_bytes(file, offset + start, view)
                writer.write_bytes(name, done + start, view)
            done += nbytes


def check_order(module: str, order: Sequence[int], experts: int, groups: int = 1) -> None:
    """Raises TersorError unless `order` is a permutation that keeps the members of a group together."""
    if sorted(order) != list(range(experts)):
        raise TersorError(f"{module}: the order is no permutation of {experts} experts", "give each expert once")
    size = experts // groups
    for start in range(0, experts if groups > 1 else 0, size):
        members = {expert // size for expert in order[start : start + size]}
        if len(members) > 1:
            raise TersorError(
                f"{module}: positions {start} to {start + size - 1} would hold experts of {len(members)} groups",
                f"the router chooses among {groups} groups of {size} experts, which have to stay together",
            )
