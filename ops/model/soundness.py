"""Is this checkpoint sound? `verify` asks it of any folder, every transforming command of its own output."""

from __future__ import annotations

from math import prod
from pathlib import Path

from tersor.formats import encodings
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.header import FLOAT_DTYPES
from tersor.formats.sparse.view import open_checkpoint
from tersor.formats.writer import Layout
from tersor.ops.model.selection import select

SAMPLED_MODULES = 3
HEAD = "lm_head.weight"
INPUT_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def check_folder(
    path: Path, expected: Layout | None = None, sample: bool = False, progress=lambda *_: None
) -> list[str]:
    """Problems of a checkpoint. `sample` looks into the data of a few modules only, else into all of it.

    `expected` is what a command has just planned and written; its report comes last, so none is looked at then.
    """
    try:
        checkpoint = open_checkpoint(path)
        view = DenseView(checkpoint)
    except TersorError as error:
        return [str(error)]
    problems = []
    if expected is not None:
        found = {name: (info.dtype, info.shape) for name, info in checkpoint.raw.tensors.items()}
        wanted = {name: (dtype, tuple(shape)) for name, (dtype, shape) in expected.items()}
        for name in sorted(found.keys() ^ wanted.keys()):
            problems.append(f"tensor {name!r} is {'missing' if name in wanted else 'not expected'}")
        problems += [
            f"tensor {name!r} is not as planned" for name in found.keys() & wanted.keys() if found[name] != wanted[name]
        ]
    problems += _layout_problems(checkpoint, view)
    problems += _ignore_problems(checkpoint, view)
    if expected is None:
        problems += _tied_problems(checkpoint)
        problems += _report_problems(view)
    return problems or _data_problems(checkpoint, view, sample, progress)


def _layout_problems(checkpoint: Checkpoint, view: DenseView) -> list[str]:
    """Each quantized module must have exactly the tensors of its scheme, and no such tensor may be without a module."""
    if view.encoding is None:
        return []
    modules = dict.fromkeys(view.encoding.modules(checkpoint.tensors))
    problems = [
        f"tensor '{module}.weight' is there twice, dense and quantized"
        for module in modules
        if view.tensors[f"{module}.weight"].scheme is None
    ]
    parts = tuple(suffix for suffix in view.encoding.SUFFIXES if suffix != ".weight")
    problems += [
        f"tensor {name!r} belongs to no quantized layer"
        for name in checkpoint.tensors
        if name.endswith(parts) and name.rsplit(".", 1)[0] not in modules
    ]
    for name, entry in view.tensors.items():
        if entry.scheme is None:
            continue
        shape = entry.shape[::-1] if entry.transposed else entry.shape
        wanted = view.encoding.layout(entry.module, shape, entry.scheme, entry.dtype)
        for tensor, (dtype, extents) in wanted.items():
            found = checkpoint.tensors.get(tensor)
            if found is None:
                problems.append(f"tensor {tensor!r} is missing")
            elif (found.dtype, found.shape) != (dtype, tuple(extents)):
                problems.append(
                    f"tensor {tensor!r} is {found.dtype} {list(found.shape)}, expected {dtype} {list(extents)}"
                )
        if f"{entry.module}.weight" in checkpoint.tensors and f"{entry.module}.weight" not in wanted:
            problems.append(f"tensor {name!r} is there twice, dense and quantized")
    return problems


def _ignore_problems(checkpoint: Checkpoint, view: DenseView) -> list[str]:
    """A dense linear layer that the config does not name would be looked for in packed form by every loader."""
    if view.encoding is None:
        return []
    covers = encodings.scheme_map(view.encoding, checkpoint.config)
    selection = select(checkpoint)
    modules = [linear.module for linear in selection.linears.values()] + selection.dense_modules
    quantized = {entry.module for entry in view.tensors.values() if entry.scheme is not None}
    return [
        f"module {module!r} is dense, but the quantization_config does not ignore it"
        for module in modules
        if module not in quantized and covers(module) is not None
    ]


def _tied_problems(checkpoint: Checkpoint) -> list[str]:
    """A copy of the embeddings is only a waste, but a head of its own would be dropped by every loader."""
    import torch

    if not (checkpoint.config or {}).get("tie_word_embeddings") or HEAD not in checkpoint.tensors:
        return []
    tables = [name for name in checkpoint.tensors if name.endswith(INPUT_TABLES)]
    if any(
        checkpoint.tensors[name].shape == checkpoint.tensors[HEAD].shape
        and torch.equal(checkpoint.map(name), checkpoint.map(HEAD))
        for name in tables
    ):
        return []
    return [f"config.json ties the word embeddings, yet there is a {HEAD} of its own"]


def _report_problems(view: DenseView) -> list[str]:
    """The report must be well-formed, list the very tensors that are there, and have been written for these bytes."""
    from tersor.formats.report import Report

    checkpoint = view.checkpoint
    if not (checkpoint.path / "report.json").is_file():
        return []
    try:
        report = Report.load(checkpoint.path)
    except TersorError as error:
        return [str(error)]
    problems = []
    listed = {entry.name: list(entry.after["shape"]) for entry in report.tensors if entry.action != "drop"}
    for name in sorted(listed.keys() ^ view.tensors.keys() if listed else ()):
        problems.append(
            f"tensor {name!r} is missing, report.json lists it"
            if name in listed
            else f"tensor {name!r} is not one that report.json lists"
        )
    for name in listed.keys() & view.tensors.keys():
        if listed[name] != list(view.tensors[name].shape):
            problems.append(
                f"tensor {name!r} has shape {list(view.tensors[name].shape)}, report.json says {listed[name]}"
            )
    recorded = (report.output or {}).get("fingerprint")
    if not problems and recorded is not None and recorded != checkpoint.fingerprint():
        problems.append("config.json or the weights have changed since report.json was written: fingerprints differ")
    return problems


def _data_problems(checkpoint: Checkpoint, view: DenseView, sample: bool, progress) -> list[str]:
    import torch

    problems = []
    modules = [name for name, entry in view.tensors.items() if not entry.is_stored]
    if sample:
        # The writer has seen every value already; this proves that what is on disk decodes. Small modules: the proof
        # should not need more memory than the work did.
        modules = sorted(modules, key=lambda name: prod(view.tensors[name].shape))[: -(-len(modules) // 2)]
        modules = modules[:: -(-len(modules) // SAMPLED_MODULES)] if modules else []
    for count, name in enumerate(modules):
        progress("decode", count, len(modules))
        try:
            weight = view.read(name)
        except TersorError as error:
            problems.append(str(error))
            continue
        if not bool(torch.isfinite(weight).all()):
            problems.append(f"tensor {name!r} decodes to NaN or Inf")
    if not sample:
        dense = [name for name, info in checkpoint.tensors.items() if info.dtype in FLOAT_DTYPES]
        for count, name in enumerate(dense):
            progress("values", count, len(dense))
            if checkpoint.tensors[name].params and not bool(
                torch.isfinite(torch.stack(torch.aminmax(checkpoint.map(name)))).all()
            ):
                problems.append(f"tensor {name!r} holds NaN or Inf")
    return problems
