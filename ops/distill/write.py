"""The trained student as a checkpoint: the layout of the one it came from, packed tensors packed again."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from tersor.formats import encodings, low_rank
from tersor.formats.dense import DenseView
from tersor.formats.report import TensorEntry
from tersor.formats.sparse.elements import from_elements, to_elements
from tersor.formats.sparse.packed import FILE_NAME, Packed, description
from tersor.formats.sparse.view import packed_config, zero_points
from tersor.formats.writer import CheckpointWriter, Layout
from tersor.ops.distill.students.student import Student
from tersor.ops.model.copy import check_finite


class Output:
    """What is written for each tensor of a student's checkpoint."""

    def __init__(self, student: Student):
        """Goes once through what is packed: how many values there are now decides the layout."""
        self.student, self.checkpoint = student, student.view.checkpoint
        self.packed: dict[str, Packed] = {}
        if self.checkpoint.packed:
            for name, tensor in student.export():
                if name in self.checkpoint.packed:
                    self.packed[name] = self._again(self.checkpoint.packed[name], tensor)

    @property
    def layout(self) -> Layout:
        layout: Layout = {}
        for name, entry in self.student.layout.items():
            layout |= self.packed[name].layout if name in self.packed else {name: entry}
        return layout

    def _elements(self, packed: Packed, tensor: torch.Tensor) -> torch.Tensor:
        return to_elements(packed, tensor, zero_points(packed, self.checkpoint.raw))

    def _again(self, before: Packed, tensor: torch.Tensor) -> Packed:
        """In the same format; as a bitmask where training has filled a group of four (with --no-keep-zeros)."""
        elements = self._elements(before, tensor)
        for format in (before.format, "sparse-bitmask"):
            packed = replace(before, format=format, tile=before.tile if format == before.format else None)
            packed = replace(packed, count=packed.codec.count(elements, packed.tile))
            if format != "sparse-24-bitmask" or packed.codec.admits(elements):
                break
        return packed

    def write(self, writer: CheckpointWriter) -> None:
        """Every tensor, and the files that say what they are. Raises TersorError for a weight that is no number."""
        for name, tensor in self.student.export():
            if name in self.student.changed and tensor.is_floating_point():
                check_finite(tensor, name, self.checkpoint)
            if name not in self.packed:
                writer.write(name, tensor)
                continue
            packed = self.packed[name]
            elements = self._elements(packed, tensor)
            if not torch.equal(from_elements(packed, elements, zero_points(packed, self.checkpoint.raw)), tensor):
                raise ValueError(f"{name}: does not unpack to what was packed")
            for part, value in packed.codec.encode(packed, elements).items():
                writer.write(part, value)
        config = self.checkpoint.config
        if self.packed:
            writer.add_json(FILE_NAME, description(self.packed.values(), config.get("quantization_config")))
            config = packed_config(config)
        if factors := low_rank.detect(self.checkpoint):
            writer.add_json(low_rank.FILE_NAME, low_rank.description(factors.values()))
        if self.student.view.encoding is encodings.encoding("gptq"):
            writer.add_json("quantize_config.json", self.checkpoint.config["quantization_config"])
        writer.add_json("config.json", config)

    def entries(self, view: DenseView) -> list[TensorEntry]:
        """A report line for every dense tensor."""
        entries, changed = [], self.student.changed
        for name, entry in view.tensors.items():
            parts = view.stored_names(name)
            before = sum(self.checkpoint.tensors[part].nbytes for part in parts)
            after = sum(
                self.packed[part].nbytes if part in self.packed else self.checkpoint.tensors[part].nbytes
                for part in parts
            )
            kind = entry.storage
            side = {"dtype": kind, "shape": list(entry.shape)}
            params = {"params": sum(self.checkpoint.tensors[part].params for part in parts)} if entry.factors else {}
            trained = any(part in changed for part in parts)
            entries.append(
                TensorEntry(
                    name, "train" if trained else "keep", None if trained else "frozen", side | {"bytes": before} | params,
                    side | {"bytes": after} | params, None, None, 8 * after / max(prod(entry.shape), 1), None,
                )
            )  # fmt: skip
        return entries
