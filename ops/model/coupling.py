"""Which rows and columns belong together, found by running a block of the model and watching its linear layers.

Every linear layer of the block is replaced by noise of its own: its output no longer depends on its input, so what
reaches the next layer's input tells what lies *between* two layers: an activation function, a gate, attention. Then,
for the layer R that reads:

1. the unit of column 0: the rows of other layers on which it depends (from gradients), all columns that these rows
   change, and so on until nothing is added. One column: neurons. A contiguous part of all columns that divides their
   number: heads, tied together by attention (with grouped queries all heads of one KV head). All columns: not separable,
   a norm for example.
2. the unit of every row: gradients of the columns whose unit number has bit b set, and of those where it is not set,
   for every b. So the layout of fused layers (gate and up, or q, k and v in one) need not be known.
3. the proof, without gradients: for every bit, the rows of the units with that bit set are changed, then those of the
   others. Exactly the columns of these units may change, bit for bit, and no other layer's input nor the block's output.
   A row that reached a column of another unit would differ from it in some bit and show.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tersor.formats.errors import TersorError
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.skeleton import EXPERTS, StoredDtype, is_linear, weight_matrix
from torch import nn

LARGEST_CLOSURE = 8


@dataclass
class Coupling:
    """Units of one reading layer, by module names within the block.

    Unit u owns the columns [u * width, (u + 1) * width) of `reader` and the rows `rows[writer][u]` of each writer.
    """

    reader: str
    kind: str  # neurons or heads
    count: int
    width: int
    rows: dict[str, torch.Tensor]


class BlockProbe:
    """A filled block whose linear layers put out noise. Raises TersorError where the block cannot be probed."""

    def __init__(self, run: BlockPass, index: int, block: nn.Module, title: str):
        self.run, self.index, self.block, self.title = run, index, block, title
        self.layers = {name: module for name, module in block.named_modules() if is_linear(module)}
        generator = torch.Generator().manual_seed(index)
        hidden = run.hidden.take(0)
        run.hidden.put(0, hidden)
        self.hidden = torch.randn(hidden.shape, generator=generator).to(hidden.device, hidden.dtype)
        self.noise: dict[str, torch.Tensor] = {}
        self.change: dict[str, torch.Tensor] = {}
        self.tied: list[str] = []  # layers that read others, but all of whose inputs belong together
        self.inputs, self.output = self._watch(torch.no_grad())

    def _forward(self, name: str, module: nn.Module, inputs: dict[str, torch.Tensor]):
        def forward(x: torch.Tensor) -> torch.Tensor:
            shape = (*x.shape[:-1], weight_matrix(module).shape[0])
            if name in inputs:
                raise TersorError(f"{self.title}.{name}: runs twice in one pass", "leave it out of what is removed")
            inputs[name] = x.clone()  # the model may go on in place
            noise = self.noise.get(name)
            if noise is None or noise.shape != shape:  # the latter where a change sends other tokens to an expert
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = torch.randn(shape, generator=generator).to(x.device, x.dtype)
            if name in self.change:
                noise = noise + self.change[name].to(noise.device) * (1 + noise.abs())
            elif not self.change:
                self.noise[name] = noise
            return (noise.requires_grad_() if torch.is_grad_enabled() else noise).clone()

        return forward

    def _watch(self, mode) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs of all linear layers that ran, and the block's output."""
        inputs: dict[str, torch.Tensor] = {}
        for name, module in self.layers.items():
            module.forward = self._forward(name, module, inputs)
        try:
            with mode, StoredDtype(self.run.skeleton.dtype):
                output = self.run._call(self.index, self.block, 0, self.hidden)
        finally:
            for module in self.layers.values():
                del module.forward
        return inputs, output

    @contextmanager
    def traced(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inputs of the layers with a graph back to the noise."""
        for name in self.noise:
            self.noise[name] = self.noise[name].detach().clone()
        inputs, self._traced_output = self._watch(torch.enable_grad())
        try:
            yield inputs
        finally:
            self._traced_output = None
            for name in self.noise:
                self.noise[name] = self.noise[name].detach()

    def rows_behind(self, x: torch.Tensor, columns: torch.Tensor) -> dict[str, torch.Tensor]:
        """For every layer on whose output some of the columns of x depend: which of its rows `[out]` bool."""
        if not x.requires_grad or not bool(columns.any()):
            return {}
        names = list(self.noise)
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype)
        found = torch.autograd.grad(
            (x * weights * columns.to(x.device)).sum(), [self.noise[name] for name in names],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        rows = {
            name: (gradient != 0).flatten(0, -2).any(0).cpu()
            for name, gradient in zip(names, found, strict=True)
            if gradient is not None
        }
        return {name: mask for name, mask in rows.items() if bool(mask.any())}

    def changed(self, rows: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
        """Change the given rows: which input columns `[in]` bool of each layer change, and whether the output does."""
        self.change = {name: mask.float() for name, mask in rows.items()}
        try:
            inputs, output = self._watch(torch.no_grad())
        finally:
            self.change = {}
        columns = {}
        for name, before in self.inputs.items():
            after = inputs.get(name)
            if after is None or after.shape != before.shape:
                columns[name] = torch.ones(before.shape[-1], dtype=torch.bool)
            else:
                columns[name] = (after != before).flatten(0, -2).any(0).cpu()
        return columns, not torch.equal(output, self.output)

    def with_noise(self, noise: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inputs of all linear layers when those in `noise` put that out."""
        kept = self.noise
        self.noise = kept | noise
        try:
            return self._watch(torch.no_grad())[0]
        finally:
            self.noise = kept

    def refuse(self, module: str, why: str) -> TersorError:
        return TersorError(
            f"{self.title}.{module}: {why}",
            "such a layer cannot be made narrower safely; --remove weights keeps all shapes",
        )


def find(probe: BlockProbe, kind: str) -> list[Coupling]:
    """The couplings of `kind` (neurons or heads) in a block, each proven. Experts of one module are alike: the one that
    most tokens reach is proven, and the others run through the very same code.

    Raises TersorError naming a layer whose units look separable but are not.
    """
    found: dict[str, Coupling] = {}
    with probe.traced() as inputs:
        for name, x in sorted(inputs.items(), key=lambda item: -item[1].numel()):
            pattern = expert_pattern(name)
            if pattern in found:
                continue
            width = _unit_width(probe, name, x)
            if width is None or (kind == "neurons") != (width == 1):
                continue
            found[pattern] = Coupling(name, kind, x.shape[-1] // width, width, _rows_of_units(probe, name, x, width))
    for coupling in found.values():
        _prove(probe, coupling)
    result = list(found.values())
    for coupling in found.values():
        result += _siblings(probe, coupling)
    return sorted(result, key=lambda coupling: list(probe.layers).index(coupling.reader))


def _unit_width(probe: BlockProbe, name: str, x: torch.Tensor) -> int | None:
    """How many columns of `name` belong to the unit of column 0; None where there is no more than one unit."""
    total = x.shape[-1]
    columns = torch.zeros(total, dtype=torch.bool)
    columns[0] = True
    for _ in range(LARGEST_CLOSURE):
        rows = probe.rows_behind(x, columns)
        if not rows or is_a_copy(probe, x, rows):
            return None
        grown = columns | probe.changed(rows)[0][name]
        if bool((grown == columns).all()):
            break
        columns = grown
    else:
        columns[:] = True
    width = int(columns.sum())
    if width == total or total % width or not bool(columns[:width].all()):
        probe.tied.append(f"{probe.title}.{name}")
        return None
    return width


def is_a_copy(probe: BlockProbe, x: torch.Tensor, rows: dict[str, torch.Tensor]) -> bool:
    """Whether x is the very output of another layer: two factors of one matrix, not an activation."""
    return len(rows) == 1 and torch.equal(x, probe.noise[next(iter(rows))])


def codes(count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(bit, units `[count]` bool): for every bit of the unit number the units that have it, then those that do not."""
    units = torch.arange(count)
    for bit in range(max(1, (count - 1).bit_length())):
        chosen = (units >> bit & 1).bool()
        yield bit, chosen
        yield ~bit, ~chosen


def _rows_of_units(probe: BlockProbe, name: str, x: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
    """The rows `[units, k]` of every layer that writes the units of `name`."""
    count = x.shape[-1] // width
    seen: dict[str, dict[int, torch.Tensor]] = {}
    for bit, units in codes(count):
        for writer, rows in probe.rows_behind(x, units.repeat_interleave(width)).items():
            seen.setdefault(writer, {})[bit] = rows
    result = {}
    for writer, by_bit in sorted(seen.items()):
        out = probe.noise[writer].shape[-1]
        unit = torch.zeros(out, dtype=torch.long)
        none = torch.zeros(out, dtype=torch.bool)
        for bit in range(max(1, (count - 1).bit_length())):
            yes, no = by_bit.get(bit, none), by_bit.get(~bit, none)
            if not bool((yes ^ no).all()):
                row = int((yes == no).nonzero()[0])
                reach = "reaches several units" if bool(yes[row]) else "does not reach any unit"
                raise probe.refuse(writer, f"row {row} {reach} of {probe.title}.{name}")
            unit += yes.long() << bit
        rows_per_unit = out // count
        order = torch.argsort(unit, stable=True)
        if out % count or not torch.equal(unit[order], torch.arange(count).repeat_interleave(rows_per_unit)):
            raise probe.refuse(writer, f"its {out} rows do not spread evenly over the {count} units of {name}")
        result[writer] = order.reshape(count, rows_per_unit)
    return result


def _prove(probe: BlockProbe, coupling: Coupling) -> None:
    """Step 3: bit by bit, exactly the columns of the changed units change. Raises TersorError otherwise."""
    for _, units in codes(coupling.count):
        rows = {}
        for writer, index in coupling.rows.items():
            rows[writer] = torch.zeros(index.numel(), dtype=torch.bool)
            rows[writer][index[units].flatten()] = True
        columns, output_changed = probe.changed(rows)
        writers = ", ".join(coupling.rows)
        if not torch.equal(columns.pop(coupling.reader), units.repeat_interleave(coupling.width)):
            raise probe.refuse(coupling.reader, f"its {coupling.kind} are not independent of each other in {writers}")
        if other := [name for name, changed in columns.items() if bool(changed.any())]:
            raise probe.refuse(other[0], f"reads the {coupling.kind} of {writers} as well")
        if output_changed:
            raise probe.refuse(next(iter(coupling.rows)), "reaches the block's output on a way of its own")


def expert_pattern(name: str) -> str:
    """The same for all experts of one module: `mlp.experts.tersor.*.down_proj`."""
    head, found, rest = name.partition(f".{EXPERTS}.")
    return f"{head}{found}*.{rest.split('.', 1)[1]}" if found else name


def _siblings(probe: BlockProbe, coupling: Coupling) -> list[Coupling]:
    """The same coupling in the other experts."""
    head, found, rest = coupling.reader.partition(f".{EXPERTS}.")
    if not found:
        return []
    mine, leaf = rest.split(".", 1)
    prefix = f"{head}{found}"
    if any(not writer.startswith(f"{prefix}{mine}.") for writer in coupling.rows):
        raise probe.refuse(coupling.reader, "its neurons are shared between experts")
    return [
        Coupling(
            f"{prefix}{expert}.{leaf}", coupling.kind, coupling.count, coupling.width,
            {writer.replace(f"{prefix}{mine}.", f"{prefix}{expert}.", 1): rows for writer, rows in coupling.rows.items()},
        )
        for expert in (name for name, _ in probe.block.get_submodule(f"{head}.{EXPERTS}").named_children())
        if expert != mine
    ]  # fmt: skip
