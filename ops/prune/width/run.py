"""Choose the units that stay, then write the tensors without the others, block by block.

While a block is cut its tensors stay in full shape with zeros, which computes the same; later blocks see what the
earlier ones really put out. A finished block is journalled with the units that stay; on --resume its readers are read
back and the text is sent through them.
"""

from __future__ import annotations

import time

import torch
from tersor.formats.header import TORCH_DTYPES
from tersor.formats.writer import CheckpointWriter
from tersor.ops.model import unit_scores as scores
from tersor.ops.model.copy import check_finite, copy_tensor
from tersor.ops.model.rewrite import set_weight
from tersor.ops.model.skeleton import weight_matrix
from tersor.ops.model.statistics import InputStatistics, is_starved, output_error
from tersor.ops.model.units import Units
from tersor.ops.prune.job import Job
from tersor.ops.prune.plan import Plan
from tersor.ops.prune.width.choose import choose
from tersor.ops.prune.width.cut import mask, pack, put, take, unpack
from tersor.ops.prune.width.proof import prove
from tersor.ops.prune.width.repair import held_out_damping, refit
from torch import nn


def decide(job: Job, plan: Plan) -> Plan:
    """Choose the units, unless the choice is made block by block from what the pruned blocks before put out."""
    if plan.details.skeleton.device == job.device:
        job.skeleton = plan.details.skeleton
    if plan.details.calibrated:
        _ = job.windows  # a text that is too short shows before anything is written
    choose(job, plan.details)
    return plan


def execute(job: Job, plan: Plan, writer: CheckpointWriter) -> dict:
    """Write every tensor. Returns what the report says of the quality."""
    run = Run(job, plan, writer)
    run.blocks()
    run.remainder()
    job.progress("prove", 0, 1)
    prove(job, plan, writer, run.kept)
    details = plan.details
    errors = [error for error in run.errors.values() if error is not None]
    return {
        details.kind: {
            "kept": {f"of {count}": kept for count, kept in details.kept.items()},
            "repaired": details.repair,
            **({"mean_output_relative_mse": sum(errors) / len(errors)} if errors else {}),
            **details.quality,
        }
    }


class Run:
    """What the blocks of one run share."""

    def __init__(self, job: Job, plan: Plan, writer: CheckpointWriter):
        self.job, self.plan, self.writer, self.details = job, plan, writer, plan.details
        self.checkpoint, self.skeleton, self.request = job.checkpoint, job.skeleton, job.request
        self.cuts = self.details.slots()
        self.kept: dict[str, torch.Tensor] = dict(self.details.choice)  # module of the units -> those that stay
        self.errors: dict[str, float | None] = {}
        self.written: set[str] = set()
        self.run = job.block_pass(writer.partial) if self.details.calibrated else None

    def blocks(self) -> None:
        count = len(self.skeleton.blocks)
        for index in range(count):
            self.job.progress("blocks", index, count)
            unit = self.skeleton.block_name(index)
            units = [group for group in self.details.units if group.block == index]
            if unit in self.writer.journal.done:
                self._replay(index, unit, units)
            else:
                numbers = self._block(index, units) if self.run else self._data_free(index, units)
                self.writer.finish(unit, numbers)
        self.job.progress("blocks", count, count)
        if self.run:
            self.run.pool.close()

    def _block(self, index: int, units: list[Units]) -> dict:
        numbers: dict[str, dict] = {}
        with self.skeleton.filled(index) as block:
            owner = {name: group for group in units for name in group.readers}
            layers = {name: layer for name, layer in self.skeleton.linears(index).items() if name in owner}

            def ready(name: str, statistics: InputStatistics | None) -> None:
                numbers[name] = self._reader(name, owner[name], layers[name], statistics)

            needs = {"hessian", "samples"} if self.details.repair else {"column_norms"}
            for name in self.run.run_staged(index, block, layers, needs, ready):
                ready(name, None)
        return numbers | self._rest(index)

    def _reader(self, name: str, units: Units, layer: nn.Module, statistics: InputStatistics | None) -> dict:
        """Cut and refit the layer that reads the units, when its inputs are complete. Returns its report numbers."""
        began = time.perf_counter()
        weight = weight_matrix(layer).float()
        slot = units.slot(name)
        measured = not is_starved(statistics)
        if units.module not in self.kept:
            self.kept[units.module] = self._by_activation(units, weight, statistics if measured else None)
        kept = self.kept[units.module]
        places = slot.places(kept).to(weight.device)
        repaired = measured and self.details.repair
        damping = held_out_damping(weight, statistics, places, self.request.damping) if repaired else None
        new = weight[:, places] if damping is None else refit(weight, statistics.hessian, places, damping)
        dtype = getattr(torch, TORCH_DTYPES[self.checkpoint.tensors[name].dtype])
        new = new.to(dtype)
        full = torch.zeros_like(weight).index_copy_(1, places, new.float())
        how = "least squares" if damping is not None else "a refit does not help tokens it has not seen"
        numbers = self._describe(units, name, how if repaired else "too few calibration tokens to refit")
        if not self.details.repair:
            numbers["reason"] = self.plan.actions[name].reason
        if repaired:
            error = self.errors[name] = output_error(weight, full, statistics.hessian)
            numbers["error"] = {
                "output_relative_mse": error,
                "output_relative_mse_without_repair": output_error(
                    weight, torch.zeros_like(weight).index_copy_(1, places, weight[:, places]), statistics.hessian
                ),
            }
            numbers["damping"] = damping
            numbers["calibration_tokens"] = statistics.tokens
        set_weight(layer, full.to(layer.weight.dtype))
        stored = full.to(dtype) if self.request.keep_shape else new
        numbers |= self._write(name, (stored if isinstance(layer, nn.Linear) else stored.T).cpu()) or {}
        numbers["seconds"] = round(time.perf_counter() - began, 4)
        return numbers

    def _by_activation(self, units: Units, weight: torch.Tensor, statistics: InputStatistics | None) -> torch.Tensor:
        """The units with the largest activation times column; by their columns alone where no text came by."""
        count = self.details.kept[units.count]
        index = units.slot(units.readers[0]).index
        columns = weight.square().sum(0).cpu()[index]
        squares = torch.ones_like(columns)
        if statistics is not None:
            squares = (statistics.column_norms.cpu().square() / statistics.tokens)[index]
        return scores.strongest(scores.activation(squares, columns), count)

    def _describe(self, units: Units, name: str, how: str) -> dict:
        reason = self.plan.actions[name].reason
        return {"reason": f"{reason}; {how}", "kept": pack(self.kept[units.module], units.count)}

    def _data_free(self, index: int, units: list[Units]) -> dict:
        numbers = {}
        for group in units:
            for name in group.readers:
                numbers[name] = self._describe(group, name, "not refitted")
        for name, found in self._rest(index).items():
            numbers.setdefault(name, {}).update(found)
        return numbers

    def _rest(self, index: int) -> dict:
        """Everything of a block that is not written yet: cut as it is stored, or copied. Returns report numbers."""
        return {name: found for name in self.skeleton.checkpoint_names(index) if (found := self.cut(name))}

    def cut(self, name: str) -> dict | None:
        """Write a tensor without the units that go, unless it is written. Returns report numbers of a masked one."""
        if name in self.written:
            return None
        action = self.plan.actions[name]
        if name not in self.cuts or not action.outputs:
            if action.outputs:
                copy_tensor(self.checkpoint, name, self.writer, action.written)
            self.written.add(name)
            return None
        tensor = self.checkpoint.read(name)
        check_finite(tensor, name, self.checkpoint)
        for units, slot in self.cuts[name]:
            tensor = (mask if self.request.keep_shape else take)(tensor, slot, self.kept[units.module])
        if name in self.details.gains:
            tensor = self.details.gains[name].scaled(tensor)
        return self._write(name, tensor)

    def _write(self, name: str, tensor: torch.Tensor) -> dict | None:
        self.writer.write(self.plan.actions[name].written, tensor)
        self.written.add(name)
        return {"sparsity": float((tensor == 0).float().mean())} if self.request.keep_shape else None

    def _replay(self, index: int, unit: str, units: list[Units]) -> None:
        """Send the text through a block that an interrupted run has finished."""
        done = self.writer.journal.done[unit]
        self.written.update(self.skeleton.checkpoint_names(index))
        for group in units:
            self.kept[group.module] = unpack(done[group.readers[0]]["kept"])
            for name in group.readers:
                self.errors[name] = (done[name].get("error") or {}).get("output_relative_mse")
        if self.run is None:
            return
        with self.skeleton.filled(index) as block:
            layers = self.skeleton.linears(index)
            for group in units:
                for name in group.readers:
                    weight = self.writer.read(self.plan.actions[name].written)
                    if not self.request.keep_shape:
                        slot = group.slot(name)
                        weight = put(weight, slot, self.kept[group.module], slot.index.numel())
                    weight = weight if isinstance(layers[name], nn.Linear) else weight.T
                    set_weight(layers[name], weight.to(self.skeleton.device, self.skeleton.dtype))
            self.run.run(index, block)

    def remainder(self) -> None:
        """What no block holds."""
        for name in self.checkpoint.tensors:
            if name not in self.written and name not in self.writer.journal.done:
                found = self.cut(name)
                self.writer.finish(name, {name: found} if found else None)
