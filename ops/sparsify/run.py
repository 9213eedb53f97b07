"""`sparsify`: make a pattern where one is asked for, choose a format for each layer, pack, prove it."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.output import check_output
from tersor.formats.report import Report, TensorEntry
from tersor.formats.sparse.packed import FILE_NAME, Packed, description
from tersor.formats.sparse.view import open_checkpoint, packed_config
from tersor.formats.writer import CheckpointWriter, Layout, writing
from tersor.ops.model.copy import copy_tensor
from tersor.ops.model.step import REORDERED, begin, publish, settings
from tersor.ops.sparsify.pack import Choice, Packer
from tersor.ops.sparsify.plan import plan
from tersor.ops.sparsify.request import Request
from tersor.ops.sparsify.selection import break_even, write_plan
from tersor.ops.sparsify.targets import Target, Targets

if TYPE_CHECKING:
    from tersor.ops.sparsify.activations.run import Calibration

Progress = Callable[[str, int, int], None]


def sparsify(request: Request, progress: Progress = lambda stage, done, total: None) -> Report:
    """Write a packed checkpoint to `request.output`. Raises TersorError and leaves no output on failure."""
    checkpoint, targets = plan(request)
    check_output(request.output, checkpoint.path, request.force, request.resume)
    from tersor.ops.model.device import pick_device

    device = pick_device(request.device)
    key, report = begin("sparsify", checkpoint, settings(request), str(device))
    packer = Packer(checkpoint, targets, request, device)
    packer.permute(progress)
    packer.measure(progress)
    choices = {}
    for count, target in enumerate(targets.found.values()):
        progress("counting zeros", count, len(targets.found))
        choices[target.stored] = packer.choose(target)
    packed = _packed(checkpoint, targets.found, choices, request)
    layout: Layout = {}
    for name, info in checkpoint.tensors.items():
        layout |= packed[name].layout if name in packed else {name: (info.dtype, info.shape)}
    with writing(CheckpointWriter(request.output, layout, key, request.resume)) as writer:
        _write(packer, packed, writer, progress)
        _describe(checkpoint, packed, choices, packer, writer)
        report.tensors = _entries(packer, targets, choices)
        report.quality |= _quality(packer, choices)
        report.warnings += targets.warnings + packer.warnings + _warnings(packer, report.quality)
        if request.activations is not None:
            calibrated = _activations(checkpoint.path, request, targets, writer, device, progress)
            report.quality["activation_sparsity"] = calibrated.report()
            report.warnings += [
                *calibrated.warnings,
                *(f"{name} has no threshold: {why}" for name, why in calibrated.skipped.items()),
            ]
        progress("verify", 0, 1)
        publish(writer, checkpoint, report)
    return report


def _packed(
    checkpoint: Checkpoint, targets: dict[str, Target], choices: dict[str, Choice], request: Request
) -> dict[str, Packed]:
    """Everything that the output holds packed: what was chosen, and what came packed and was left alone.

    Raises TersorError when that is nothing.
    """
    found = {name: entry for name, entry in checkpoint.packed.items() if name not in choices}
    found |= {name: choice.packed for name, choice in choices.items() if choice.packed is not None}
    if not found and request.activations is None:
        target = max(targets.values(), key=lambda target: choices[target.stored].numbers["sparsity"])
        if target.format.goal == "time" and choices[target.stored].entry.get("predicted"):
            raise TersorError(
                f"{checkpoint.path}: the dense kernel is the fastest for every layer here, for {request.tokens} tokens at once",
                "save bytes instead with --format auto, or see tersor profile MODEL --sparse-crossover",
            )
        most, bits = choices[target.stored].numbers["sparsity"], target.template.bits
        needed = break_even(bits, target.template.columns, "sparse-bitmask")
        raise TersorError(
            f"{checkpoint.path}: no layer has enough zeros to pack: the most are {most:.1%}, of {target.stored!r}",
            f"make zeros first: tersor prune MODEL -o A --remove weights, or --pattern; its {bits}-bit weights pay from {needed:.1%} on",
        )
    return found


def _write(packer: Packer, packed: dict[str, Packed], writer: CheckpointWriter, progress: Progress) -> None:
    """Every tensor of the input, one after another."""
    checkpoint = packer.checkpoint
    targets = {target.stored: target for target in packer.targets.values()}
    for count, name in enumerate(checkpoint.tensors):
        progress("tensors", count, len(checkpoint.tensors))
        if name in writer.journal.done:
            continue
        if name in targets:
            _write_target(packer, targets[name], packed.get(name), writer)
        elif name in packed:
            for part in packed[name].layout:
                copy_tensor(checkpoint.raw, part, writer)
        elif packer.permutations is not None and name in packer.permutations.names:
            writer.write(name, packer.permuted(name, checkpoint.read(name)))
        else:
            copy_tensor(checkpoint, name, writer)
        writer.finish(name, None)
    progress("tensors", len(checkpoint.tensors), len(checkpoint.tensors))


def _write_target(packer: Packer, target: Target, packed: Packed | None, writer: CheckpointWriter) -> None:
    elements, _ = packer.elements(target)
    if packed is None:
        if target.template.in_words:  # elements have no place for bits that belong to no code
            copy_tensor(packer.checkpoint, target.stored, writer)
        else:
            writer.write(target.stored, packer.stored(target, elements))
        return
    parts = packed.codec.encode(packed, elements)
    if not torch.equal(packed.codec.decode(packed, parts.__getitem__), elements):
        raise TersorError(f"{target.name}: does not unpack to what was packed", "please report this as a bug")
    for part, tensor in parts.items():
        writer.write(part, tensor)


def _describe(
    checkpoint: Checkpoint,
    packed: dict[str, Packed],
    choices: dict[str, Choice],
    packer: Packer,
    writer: CheckpointWriter,
) -> None:
    """The files that say what the tensors are."""
    config = checkpoint.config
    if packed:
        inner = (config or {}).get("quantization_config")
        writer.add_json(FILE_NAME, description(packed.values(), inner))
        config = packed_config(config)
    if config is not None:
        writer.add_json("config.json", config)
    entries = {name: choice.entry for name, choice in choices.items() if choice.entry}
    write_plan(writer.partial, packer.request.format, packer.costs and packer.costs.device, entries)


def _entries(packer: Packer, targets: Targets, choices: dict[str, Choice]) -> list[TensorEntry]:
    """A line for every dense tensor of the input."""
    checkpoint = packer.checkpoint
    view = DenseView(checkpoint)
    reordered = packer.permutations.names if packer.permutations is not None else ()
    result = []
    for name, entry in view.tensors.items():
        nbytes = sum(checkpoint.tensors[part].nbytes for part in view.stored_names(name))
        kind = entry.storage
        before = {"dtype": kind, "shape": list(entry.shape), "bytes": nbytes}
        target = targets.found.get(name)
        if target is None:
            action, reason = ("reorder", REORDERED) if name in reordered else ("keep", targets.kept.get(name))
            result.append(TensorEntry(name, action, reason, before, before))
            continue
        choice = choices[target.stored]
        own = target.template.stored_nbytes if choice.packed is None else choice.packed.nbytes
        after = target.others_nbytes + own
        unmasked = "reorder" if name in reordered else "keep"
        action = "pack" if choice.packed else unmasked if target.pattern is None else "mask"
        result.append(
            TensorEntry(
                name, action, choice.reason + (f", {REORDERED}" if name in reordered else ""), before, before | {"bytes": after}, choice.numbers.get("error"),
                choice.numbers["sparsity"], 8 * after / prod(entry.shape), None,
            )
        )  # fmt: skip
    return result


def _quality(packer: Packer, choices: dict[str, Choice]) -> dict:
    """Formats by how many layers have them, importance kept by the pattern, what permuting brought, predicted times."""
    formats: dict[str, int] = {}
    for choice in choices.values():
        name = "dense" if choice.packed is None else choice.entry["format"]
        formats[name] = formats.get(name, 0) + 1
    found: dict = {"layers_by_format": formats}
    kept = [choice.numbers["kept_importance"] for choice in choices.values() if "kept_importance" in choice.numbers]
    if kept:
        found["kept_importance"] = sum(kept) / len(kept)
    if packer.permutations is not None:
        report = packer.permutations.report()
        found["permutation"] = {
            "kept_before": report["kept"].get("before"),
            "kept_after": report["kept"].get("after"),
            "channels": {kind: numbers["channels"] for kind, numbers in report["kinds"].items()},
            **{key: report[key] for key in ("measure", "tensors", "reasons", "seconds", "groups")},
        }
    predicted = [line for choice in choices.values() for line in choice.entry.get("predicted", [])]
    if predicted and len(predicted) == len(choices):
        seconds, dense = (sum(line[key] for line in predicted) for key in ("seconds", "dense_seconds"))
        found["predicted_matmuls"] = {
            "tokens": packer.request.tokens,
            "seconds": seconds,
            "dense_seconds": dense,
            "gain": dense / seconds,
            "device": packer.costs.device,
        }
    return found


def _warnings(packer: Packer, quality: dict) -> list[str]:
    found = []
    if packer.negative_zeros:
        found.append(
            f"{packer.negative_zeros} weights are -0.0, which is kept as a value of its own; --positive-zeros makes them zero"
        )
    predicted = quality.get("predicted_matmuls")
    if predicted is not None and predicted["gain"] < 1:
        found.append(
            f"smaller, but slower: on {predicted['device']} the packed layers take {1 / predicted['gain']:.2g} times as long as dense "
            f"ones with {predicted['tokens']} tokens at once; --format fastest keeps dense what is faster so"
        )
    return found


def _activations(
    source: Path, request: Request, targets: Targets, writer: CheckpointWriter, device: torch.device, progress: Progress
) -> Calibration:
    """Thresholds for the inputs of the layers as they have just been written."""
    from tersor.formats.activation_thresholds import FILE_NAME as THRESHOLDS
    from tersor.ops.model.calibration import load_windows
    from tersor.ops.sparsify.activations.run import calibrate

    written = open_checkpoint(writer.partial)
    windows = load_windows(source, request.calib, request.samples, request.seq_len, request.seed)
    found = calibrate(
        DenseView(written),
        request.activations,
        windows,
        device,
        request.max_memory_bytes,
        [name for name in targets.found if name not in targets.kept],
        progress,
    )
    writer.add_json(THRESHOLDS, found.description())
    return found
