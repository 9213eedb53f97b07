"""Where routers send tokens, as a file: a trace or the counts that are left of one; and the expert map that answers it.

Read are safetensors files of three kinds. A *trace*: one tensor of integers called `trace` or `routing`,
`[tokens, layers, k]` (or `[tokens, layers]` for one expert a token), the experts that each token went to in each mixture
in turn. *Counts*: `transitions` `[layers - 1, experts, experts]`, how often a token went from expert i of a layer to
expert j of the next, and if it is there `counts` `[layers, experts]`. And what `tersor profile --collect routing` saves
(formats/statistics.py): `MODULE.counts` and `MODULE.transitions`.

A token with k experts counts k * k times in each step, once for each pair. numpy is all that is needed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tersor.formats.errors import TersorError
from tersor.formats.header import TensorInfo, read_header
from tersor.formats.json_file import read_object

TRACES = ("trace", "routing")
MAP_SCHEMA = "tersor.experts/1"
TOKENS_AT_ONCE = 1 << 14
HINT = (
    "give a safetensors file with a trace [tokens, layers, k], with transitions [layers - 1, experts, experts], "
    "or what `tersor profile --collect routing` saves"
)
NUMPY = {
    "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1",
    "F64": "f8", "F32": "f4", "F16": "f2",
}  # fmt: skip


@dataclass(frozen=True)
class Routing:
    """`transitions[l]` `[experts, experts]` is from layer l to layer l + 1, `counts` `[layers, experts]`.

    `modules` are names of the mixtures where the file has them. `trace` `[tokens, layers, k]` where tokens are known.
    """

    experts: int
    counts: np.ndarray
    transitions: np.ndarray
    trace: np.ndarray | None = None
    modules: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.counts)

    @cached_property
    def tokens(self) -> int | None:
        return None if self.trace is None else len(self.trace)

    def split(self, share: float = 0.2) -> tuple[Routing, Routing]:
        """(the first tokens, the last `share` of them): a placement made for the first is judged by the last.

        In order, not at random: neighbours in a text are alike. Raises TersorError where only counts are known.
        """
        if self.trace is None:
            raise TersorError("the routing file holds counts, not tokens", "held-out tokens need a trace")
        held = round(share * len(self.trace))
        if not 0 < held < len(self.trace):
            raise TersorError(f"{len(self.trace)} tokens cannot be split", "give a longer trace")
        first, last = self.trace[:-held], self.trace[-held:]
        return from_trace(first, self.experts, self.modules), from_trace(last, self.experts, self.modules)


def from_trace(trace: np.ndarray, experts: int | None = None, modules: tuple[str, ...] = ()) -> Routing:
    """`trace` `[tokens, layers, k]` of integers from 0 on. Raises TersorError naming a number that is no expert."""
    trace = np.asarray(trace)
    if trace.ndim == 2:
        trace = trace[:, :, None]
    if trace.ndim != 3 or not trace.size or not np.issubdtype(trace.dtype, np.integer):
        raise TersorError(f"a trace of shape {list(trace.shape)} and type {trace.dtype} is none", HINT)
    least, most = int(trace.min()), int(trace.max())
    experts = most + 1 if experts is None else experts
    if least < 0 or most >= experts:
        wrong = least if least < 0 else most
        raise TersorError(f"the trace names expert {wrong}, the model has {experts} (0 to {experts - 1})", HINT)
    tokens, layers, _ = trace.shape
    counts = np.stack([np.bincount(trace[:, layer].ravel(), minlength=experts) for layer in range(layers)])
    transitions = np.zeros((layers - 1, experts, experts))
    for start in range(0, tokens, TOKENS_AT_ONCE):
        part = trace[start : start + TOKENS_AT_ONCE].astype(np.int64)
        for layer in range(layers - 1):
            pairs = part[:, layer, :, None] * experts + part[:, layer + 1, None, :]
            transitions[layer] += np.bincount(pairs.ravel(), minlength=experts * experts).reshape(experts, experts)
    return Routing(experts, counts.astype(float), transitions, trace, modules)


def read_routing(path: str | Path, experts: int | None = None) -> Routing:
    """`experts`: how many the model has. Raises TersorError for a file that holds no routing, or that of another model."""
    path = Path(path)
    path = path / "stats.safetensors" if path.is_dir() else path
    tensors, _ = read_header(path)
    name = next((name for name in TRACES if name in tensors), None)
    if name is not None:
        found = from_trace(_array(tensors[name]), experts)
    elif "transitions" in tensors:
        found = _from_counts(path, tensors)
    elif any(name.endswith(".counts") for name in tensors):
        found = _from_statistics(path, tensors)
    else:
        raise TersorError(f"{path}: holds no routing", HINT)
    if experts is not None and found.experts != experts:
        raise TersorError(f"{path}: counts of {found.experts} experts, the model has {experts}", HINT)
    return found


def _array(info: TensorInfo) -> np.ndarray:
    kind = NUMPY.get(info.dtype)
    if kind is None:
        raise TersorError(f"{info.file}: {info.name!r} has dtype {info.dtype}", "routing is stored as integers")
    try:
        flat = np.fromfile(info.file, f"<{kind}", info.params, offset=info.offset)
    except OSError as error:
        raise TersorError(f"{info.file}: {error.strerror}", "check the disk") from error
    return flat.reshape(info.shape)


def _from_counts(path: Path, tensors: dict[str, TensorInfo]) -> Routing:
    steps = _checked(path, "transitions", _array(tensors["transitions"]).astype(float))
    if steps.ndim != 3 or steps.shape[1] != steps.shape[2] or not len(steps):
        raise TersorError(f"{path}: 'transitions' has shape {list(steps.shape)}", HINT)
    experts = steps.shape[1]
    if "counts" in tensors:
        counts = _checked(path, "counts", _array(tensors["counts"]).astype(float))
        if counts.shape != (len(steps) + 1, experts):
            wanted = [len(steps) + 1, experts]
            raise TersorError(f"{path}: 'counts' has shape {list(counts.shape)}, 'transitions' say {wanted}", HINT)
    else:  # pairs, so k times as many as tokens: shares are what is asked of them
        counts = np.concatenate([steps.sum(2), steps[-1:].sum(1)])
    return Routing(experts, counts, steps)


def _from_statistics(path: Path, tensors: dict[str, TensorInfo]) -> Routing:
    modules = sorted((name.removesuffix(".counts") for name in tensors if name.endswith(".counts")), key=_natural)
    counts = [_checked(path, name, _array(tensors[f"{name}.counts"]).astype(float)) for name in modules]
    sizes = {len(one) for one in counts}
    if len(sizes) != 1:
        raise TersorError(f"{path}: layers with {' and '.join(map(str, sorted(sizes)))} experts", "all need as many")
    experts, steps = sizes.pop(), []
    for module in modules[1:]:
        info = tensors.get(f"{module}.transitions")
        if info is None or info.shape != (experts, experts):
            raise TersorError(f"{path}: '{module}.transitions' is missing or not [{experts}, {experts}]", HINT)
        steps.append(_checked(path, info.name, _array(info).astype(float)))
    return Routing(experts, np.stack(counts), np.array(steps).reshape(-1, experts, experts), None, tuple(modules))


def _checked(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all() or (values < 0).any():
        raise TersorError(f"{path}: {name!r} holds numbers that are no counts", "collect the routing again")
    return values


def _natural(name: str) -> list:
    """Layer 10 comes after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def write_expert_map(path: Path, orders: dict[str, list[int]], devices: int, nodes: int) -> None:
    """`orders` by module: which expert of the source stands at each position; a device has consecutive positions."""
    value = {"schema": MAP_SCHEMA, "devices": devices, "nodes": nodes, "layers": orders}
    Path(path).write_text(json.dumps(value) + "\n", "utf-8")


def read_expert_map(path: Path) -> dict[str, list[int]]:
    """Raises TersorError for another schema, and for an order that is no permutation."""
    value = read_object(Path(path), "write it again")
    if value.get("schema") != MAP_SCHEMA or not isinstance(value.get("layers"), dict):
        raise TersorError(f"{path}: holds {value.get('schema', 'no schema')}, not {MAP_SCHEMA}", "write it again")
    for module, order in value["layers"].items():
        if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(len(order)))):
            raise TersorError(f"{path}: the order of {module} is no permutation", "write it again")
    return value["layers"]
