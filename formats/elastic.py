"""`elastic.json` (schema tersor.elastic/1): the sub-networks that one checkpoint holds, each a prefix of the next larger.

The neurons of every FFN and the KV heads of every attention are sorted by importance in the tensors themselves, so that a
sub-network keeps the first ones of each block; `blocks` lists all blocks, the most important first, and a sub-network
keeps the first ones of that list.

    {"schema": "tersor.elastic/1", "method": "activation", "multiple_of": 1,
     "space": {"neurons": [1, 0.75, 0.5], "heads": [1, 0.5], "depth": [1, 0.75], "per_block": false},
     "blocks": [0, 3, 1, 2],
     "groups": [{"module": "model.layers.0.mlp.down_proj", "kind": "neurons", "block": 0, "count": 1536, "order": [...]}],
     "networks": {"largest": {"neurons": 1, "heads": 1, "depth": 1}, "smallest": {...}},
     "bank": [{"level": 0, "loss": 0.12, "parameters": ..., "flops": ..., "network": {...}}]}

`order[i]` is which unit of the checkpoint before sorting is unit i now. Shares of a network are numbers, or lists with one
for each block, 0 where the block does not run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.json_file import read_object

FILE = "elastic.json"
SCHEMA = "tersor.elastic/1"
WIDTHS = ("neurons", "heads")
KEYS = (*WIDTHS, "depth")
HOW = "as in neurons=0.5,heads=0.75,depth=0.75"
DAMAGED = "write it again: tersor distill --elastic"


@dataclass(frozen=True)
class SubNetwork:
    """Shares of the units of each block, by block, 0 for one that does not run; and the share of blocks that run."""

    neurons: tuple[float, ...]
    heads: tuple[float, ...]
    depth: float

    def shares(self, kind: str) -> tuple[float, ...]:
        return self.neurons if kind == "neurons" else self.heads

    def to_json(self) -> dict[str, Any]:
        """One number for a width that is the same in all blocks that run."""
        result: dict[str, Any] = {}
        for kind in WIDTHS:
            found = {share for share in self.shares(kind) if share}
            result[kind] = _plain(found.pop()) if len(found) == 1 else [_plain(share) for share in self.shares(kind)]
        return result | {"depth": _plain(self.depth)}

    def describe(self) -> str:
        """What `resolve` makes this sub-network of."""
        shares = self.to_json()
        if any(isinstance(value, list) for value in shares.values()):
            return json.dumps(shares)
        return ",".join(f"{key}={value}" for key, value in shares.items())


@dataclass(frozen=True)
class SortedUnits:
    """Units of one module, `kind` neurons or heads; `order` as in the file."""

    module: str
    kind: str
    block: int
    count: int
    order: tuple[int, ...]


@dataclass
class Nesting:
    """What of a checkpoint is nested: the content of elastic.json. `options` are the shares that were trained."""

    method: str
    options: dict[str, tuple[float, ...]]
    blocks: tuple[int, ...]
    groups: list[SortedUnits]
    per_block: bool = False
    multiple_of: int = 1
    networks: dict[str, SubNetwork] = field(default_factory=dict)
    bank: list[dict] = field(default_factory=list)  # entries of the file, their networks as SubNetwork

    def network(self, neurons: float | Sequence[float] = 1, heads: float | Sequence[float] = 1, depth: float = 1):
        """The sub-network with these shares, one for all blocks or one for each; those of blocks that go are ignored."""
        kept = set(self.kept_blocks(depth))

        def spread(shares: float | Sequence[float]) -> tuple[float, ...]:
            every = shares if isinstance(shares, Sequence) else [shares] * len(self.blocks)
            return tuple(float(share) if block in kept else 0.0 for block, share in enumerate(every))

        return SubNetwork(spread(neurons), spread(heads), float(depth))

    def kept_blocks(self, depth: float) -> list[int]:
        """The blocks that run, in their order."""
        return sorted(self.blocks[: kept_count(len(self.blocks), depth)])

    def kept_units(self, count: int, share: float) -> int:
        return kept_count(count, share, self.multiple_of)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "method": self.method,
            "multiple_of": self.multiple_of,
            "space": {key: [_plain(share) for share in self.options[key]] for key in KEYS}
            | {"per_block": self.per_block},
            "blocks": list(self.blocks),
            "groups": [vars(group) | {"order": list(group.order)} for group in self.groups],
            "networks": {name: network.to_json() for name, network in self.networks.items()},
            "bank": [entry | {"network": entry["network"].to_json()} for entry in self.bank],
        }


def kept_count(count: int, share: float, multiple_of: int = 1) -> int:
    """How many of `count` a share keeps: rounded up to a multiple, one at least, `count` at most."""
    wanted = max(1, math.ceil(round(count * share, 6)))
    return min(count, -(-wanted // multiple_of) * multiple_of)


def read_elastic(checkpoint: Checkpoint) -> Nesting | None:
    """What the elastic.json of a checkpoint says, None where it has none. Raises TersorError for a damaged one."""
    path = checkpoint.path / FILE
    if not checkpoint.path.is_dir() or not path.exists():
        return None
    return from_json(read_object(path, DAMAGED), path)


def from_json(content: dict, path: Path) -> Nesting:
    """Raises TersorError, naming `path`, for content that is no elastic.json."""
    if content.get("schema") != SCHEMA:
        raise TersorError(f"{path}: its schema is {content.get('schema')!r}, not {SCHEMA!r}", DAMAGED)
    try:
        space = content["space"]
        options = {key: tuple(float(share) for share in space[key]) for key in KEYS}
        blocks = tuple(content["blocks"])
        groups = [
            SortedUnits(entry["module"], entry["kind"], entry["block"], entry["count"], tuple(entry["order"]))
            for entry in content["groups"]
        ]
        nesting = Nesting(
            content["method"], options, blocks, groups, bool(space["per_block"]), int(content["multiple_of"])
        )
        _check(nesting, path)
        for name, network in content["networks"].items():
            nesting.networks[name] = _network(network, nesting, f"{path}: {name}")
        nesting.bank = [
            entry | {"network": _network(entry["network"], nesting, f"{path}: bank")} for entry in content["bank"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TersorError(f"{path}: damaged ({type(error).__name__} {error})", DAMAGED) from error
    return nesting


def _check(nesting: Nesting, path: Path) -> None:
    if sorted(nesting.blocks) != list(range(len(nesting.blocks))) or not nesting.blocks:
        raise TersorError(f"{path}: 'blocks' does not list every block once", DAMAGED)
    for group in nesting.groups:
        if (
            sorted(group.order) != list(range(group.count))
            or group.kind not in WIDTHS
            or group.block not in nesting.blocks
        ):
            raise TersorError(f"{path}: the entry of {group.module} is no order of its {group.count} units", DAMAGED)


def resolve(config: str, nesting: Nesting, path: Path) -> SubNetwork:
    """The sub-network that CONFIG asks for: a name of `networks`, shares as in `neurons=0.5,depth=0.75`, or JSON, in a
    file or inline, with the same keys.

    Raises TersorError for anything else. `path` is that of the checkpoint.
    """
    if config in nesting.networks:
        return nesting.networks[config]
    if config.lstrip().startswith("{"):
        try:
            content = json.loads(config)
        except ValueError as error:
            raise TersorError(f"--extract: not readable as JSON ({error})", HOW) from error
        return _network(content, nesting, "--extract")
    if "=" in config and not Path(config).is_file():
        pairs = [part.split("=", 1) for part in config.split(",")]
        try:
            content = {key.strip(): float(value) for key, value in pairs}
        except ValueError as error:
            raise TersorError(f"--extract {config}: {error}", HOW) from error
        if len(content) < len(pairs):
            raise TersorError(f"--extract {config}: names a share twice", HOW)
        return _network(content, nesting, f"--extract {config}")
    if Path(config).is_file():
        return _network(read_object(Path(config), HOW), nesting, config)
    known = " ".join(nesting.networks)
    raise TersorError(f"--extract {config!r}: neither a file nor a network of {path / FILE}", f"one of {known}; {HOW}")


def _network(content: Any, nesting: Nesting, where: str) -> SubNetwork:
    if not isinstance(content, dict) or not content or content.keys() - set(KEYS):
        raise TersorError(f"{where}: {str(content)[:80]} is not of the keys {' '.join(KEYS)}", HOW)
    for key, value in content.items():
        shares = value if isinstance(value, list) and key in WIDTHS else [value]
        if len(shares) not in (1, len(nesting.blocks)) or (
            isinstance(value, list) and len(value) == 1 != len(nesting.blocks)
        ):
            raise TersorError(
                f"{where}: {key} has {len(shares)} shares, the model {len(nesting.blocks)} blocks",
                "one for each, or one",
            )
        for share in shares:
            fits = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share <= 1
            if not fits or (share == 0 and not isinstance(value, list)):
                raise TersorError(f"{where}: {key} {share!r} is not a share, above 0 and at most 1", HOW)
    network = nesting.network(**content)
    kept = nesting.kept_blocks(network.depth)
    for kind in WIDTHS:
        for block in kept:
            if network.shares(kind)[block] == 0:
                raise TersorError(
                    f"{where}: no {kind} are left of block {block}, which runs", "0 is for blocks that go"
                )
    return network


def _plain(share: float) -> float | int:
    return int(share) if share == int(share) else share
