"""`convert`: the same codes in another encoding, or dense weights again, from codes, from factors, or from packed zeros.

A packed checkpoint is unpacked first: `--to dense` without a dtype gives back the very checkpoint that was packed, codes
included; once more makes codes dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tersor.formats import encodings
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseTensor, DenseView
from tersor.formats.encodings import QuantizedWeight
from tersor.formats.errors import TersorError
from tersor.formats.header import FLOAT_DTYPES, SAFETENSORS_DTYPES, TORCH_DTYPES, tensor_bytes
from tersor.formats.locate import locate
from tersor.formats.output import check_output
from tersor.formats.report import Report, TensorEntry
from tersor.formats.sparse.view import open_checkpoint
from tersor.formats.writer import CheckpointWriter, Layout, writing
from tersor.ops.model.copy import copy_tensor
from tersor.ops.model.step import begin, publish, settings

TARGETS = ("dense", "compressed-tensors", "gptq")
OTHERWISE = "keep the encoding, or make it dense (tersor convert --to dense) and quantize again"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass
class Request:
    model: str
    output: Path
    to: str
    dtype: str | None = None
    force: bool = False
    resume: bool = False


def convert(request: Request, progress: Callable[[str, int, int], None] = lambda stage, done, total: None) -> Report:
    """Write `request.model` in another encoding. Raises TersorError where that would lose something."""
    if request.to not in TARGETS:
        raise TersorError(f"unknown target {request.to!r}", f"one of {' '.join(TARGETS)}")
    if request.dtype is not None and (request.dtype not in DTYPES or request.to != "dense"):
        raise TersorError(f"--dtype {request.dtype}", f"one of {' '.join(DTYPES)}, together with --to dense")
    checkpoint = open_checkpoint(locate(request.model))
    check_output(request.output, checkpoint.path, request.force, request.resume)
    if checkpoint.packed and request.to == "dense" and request.dtype is None:
        return _unpack(checkpoint, request, progress)
    view = DenseView(checkpoint)
    if not checkpoint.packed and not view.is_quantized and not view.is_factorised:
        raise TersorError(f"{checkpoint.path}: is dense already", "quantize it with tersor quantize")
    _check_target(view, checkpoint, request.to)
    layout = {name: _plan(view, entry, name, request) for name, entry in view.tensors.items()}
    key, report = begin("convert", checkpoint, settings(request), "cpu")
    flat: Layout = {name: entry for tensors in layout.values() for name, entry in tensors.items()}
    with writing(CheckpointWriter(request.output, flat, key, request.resume)) as writer:
        for count, (name, entry) in enumerate(view.tensors.items()):
            progress("tensors", count, len(view.tensors))
            if name not in writer.journal.done:
                _write(view, entry, name, layout[name], request, writer)
                writer.finish(name, None)
            report.tensors.append(_entry(view, entry, name, layout[name]))
        _write_config(checkpoint, view, request, writer)
        publish(writer, checkpoint, report)
    return report


def _unpack(checkpoint: Checkpoint, request: Request, progress: Callable[[str, int, int], None]) -> Report:
    """The checkpoint as it was before it was packed."""
    key, report = begin("convert", checkpoint, settings(request), "cpu")
    layout: Layout = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    with writing(CheckpointWriter(request.output, layout, key, request.resume)) as writer:
        for count, name in enumerate(layout):
            progress("tensors", count, len(layout))
            if name not in writer.journal.done:
                copy_tensor(checkpoint, name, writer)
                writer.finish(name, None)
        if checkpoint.config is not None:
            writer.add_json("config.json", checkpoint.config)
        view = DenseView(checkpoint)
        if view.encoding is encodings.encoding("gptq"):
            writer.add_json("quantize_config.json", checkpoint.config["quantization_config"])
        report.tensors = [_unpacked_entry(view, entry, name) for name, entry in view.tensors.items()]
        if view.is_quantized:
            report.warnings.append(
                "unpacked and still quantized, as it was: convert --to dense once more for dense weights"
            )
        publish(writer, checkpoint, report)
    return report


def _unpacked_entry(view: DenseView, entry: DenseTensor, name: str) -> TensorEntry:
    checkpoint, parts = view.checkpoint, view.stored_names(name)
    before = sum(checkpoint.tensors[part].nbytes for part in parts)
    after = sum(tensor_bytes(checkpoint.tensors[part].dtype, checkpoint.tensors[part].shape) for part in parts)
    kind = entry.storage
    action = "unpack" if any(part in checkpoint.packed for part in parts) else "keep"
    side = {"dtype": kind, "shape": list(entry.shape)}
    return TensorEntry(name, action, None, side | {"bytes": before}, side | {"bytes": after})


def _check_target(view: DenseView, checkpoint: Checkpoint, to: str) -> None:
    """Raises TersorError when no reader would see the same weights in `to`, or nothing would change."""
    entries = [entry for entry in view.tensors.values() if entry.scheme is not None]
    if to == "dense":
        return
    if not entries and not view.is_factorised:
        raise TersorError(
            f"{checkpoint.path}: its weights are packed, but no codes, which {to} holds",
            "unpack them first (tersor convert MODEL --to dense -o DENSE), then tersor quantize",
        )
    if view.is_factorised:
        raise TersorError(f"{checkpoint.path}: holds factors, which {to} cannot", "make it dense: --to dense")
    if view.encoding is encodings.encoding(to) and not any(entry.scheme.gptq_v2 for entry in entries):
        raise TersorError(f"{checkpoint.path}: is stored as {to} already", "there is nothing to convert")
    conv1d = next((entry.module for entry in entries if entry.transposed), None)
    if to == "compressed-tensors" and conv1d is not None:
        raise TersorError(f"{conv1d}: is a Conv1D, which {to} loaders pass by; they know Linear only", OTHERWISE)


def _dense_dtype(view: DenseView, entry: DenseTensor, request: Request) -> str:
    if request.dtype is not None and entry.dtype in FLOAT_DTYPES:
        return DTYPES[request.dtype]
    if entry.scheme is None:
        return entry.dtype
    declared = (view.config or {}).get("dtype") or (view.config or {}).get("torch_dtype")
    return DTYPES.get(declared, entry.dtype)


def _plan(view: DenseView, entry: DenseTensor, name: str, request: Request) -> Layout:
    if entry.scheme is None or request.to == "dense":
        return {name: (_dense_dtype(view, entry, request), entry.shape)}
    shape = entry.shape[::-1] if entry.transposed else entry.shape
    target = encodings.encoding(request.to)
    try:
        target.check(entry.module, shape, entry.scheme)
    except TersorError as error:
        raise TersorError(str(error), OTHERWISE) from error
    return target.layout(entry.module, shape, entry.scheme, _scale_dtype(view, entry, request.to))


def _scale_dtype(view: DenseView, entry: DenseTensor, to: str) -> str:
    """gptq knows only fp16. The way back takes the model's own dtype when every scale is exact in it."""
    if to == "gptq":
        return "F16"
    declared = (view.config or {}).get("dtype") or (view.config or {}).get("torch_dtype")
    wanted = DTYPES.get(declared, entry.dtype)
    scale = view.codes(entry.module).scale
    dtype = getattr(torch, TORCH_DTYPES[wanted])
    return wanted if torch.equal(scale.to(dtype).float(), scale.float()) else entry.dtype


def _write(view: DenseView, entry: DenseTensor, name: str, layout: Layout, request: Request, writer: CheckpointWriter):
    if entry.is_stored and layout[name][0] == entry.dtype:
        copy_tensor(view.checkpoint, name, writer)
    elif request.to == "dense" or entry.scheme is None:
        writer.write(name, _cast(name, view.read(name), layout[name][0]))
    else:
        quantized = view.codes(entry.module)
        if quantized.group_index is not None:
            raise TersorError(f"{entry.module}: its groups are not runs of columns (desc_act)", OTHERWISE)
        if entry.scheme.symmetric and quantized.zero_point is not None:
            raise TersorError(f"{entry.module}: has zero points, yet the config calls it symmetric", OTHERWISE)
        dtype = next(dtype for tensor, (dtype, _) in layout.items() if tensor.endswith(("scale", "scales")))
        scale = quantized.scale.to(getattr(torch, TORCH_DTYPES[dtype]))
        if not torch.equal(scale.float(), quantized.scale.float()):
            raise TersorError(
                f"{entry.module}: scales in {SAFETENSORS_DTYPES[str(quantized.scale.dtype).removeprefix('torch.')]} do not fit "
                f"{dtype} without rounding",
                OTHERWISE,
            )
        same = QuantizedWeight(quantized.codes, scale, quantized.zero_point)
        for tensor, value in encodings.encoding(request.to).encode(entry.module, same, entry.scheme).items():
            writer.write(tensor, value)


def _cast(name: str, weight: torch.Tensor, dtype: str) -> torch.Tensor:
    """`weight` in `dtype`. Raises TersorError when a number is NaN or Inf, or becomes Inf there."""
    result = weight.to(getattr(torch, TORCH_DTYPES[dtype]))
    if bool(torch.isfinite(result).all()):
        return result
    if not bool(torch.isfinite(weight).all()):
        raise TersorError(f"tensor {name!r} decodes to NaN or Inf", "the checkpoint is damaged: get a sound copy")
    raise TersorError(
        f"tensor {name!r} holds {float(weight.abs().max()):.4g}, which is too large for {dtype}",
        "choose another --dtype, such as bfloat16",
    )


def _write_config(checkpoint: Checkpoint, view: DenseView, request: Request, writer: CheckpointWriter) -> None:
    if checkpoint.config is None:
        return
    config = dict(checkpoint.config)
    if request.to != "dense":
        schemes = {entry.module: entry.scheme for entry in view.tensors.values() if entry.scheme is not None}
        from tersor.ops.model.selection import select

        selection = select(checkpoint)
        dense = [*selection.dense_modules, *selection.tables, *(linear.module for linear in selection.linears.values())]
        quantization = encodings.encoding(request.to).quantization_config(
            schemes, [module for module in dense if module not in schemes]
        )
        config["quantization_config"] = quantization
        if request.to == "gptq":
            writer.add_json("quantize_config.json", quantization)
    else:
        config.pop("quantization_config", None)
        if not config:
            return  # what came from a bare file goes back to one
        if request.dtype is not None:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = request.dtype
    writer.add_json("config.json", config)


def _entry(view: DenseView, entry: DenseTensor, name: str, layout: Layout) -> TensorEntry:
    owned = [view.checkpoint.tensors[tensor] for tensor in view.stored_names(name)]
    params = {"params": sum(info.params for info in owned)} if entry.factors else {}
    after = sum(tensor_bytes(*tensor) for tensor in layout.values())
    kind = entry.storage
    target = layout[name][0] if name in layout else kind
    return TensorEntry(
        name, "keep" if entry.is_stored else "convert", None,
        {"dtype": kind, "shape": list(entry.shape), "bytes": sum(info.nbytes for info in owned), **params},
        {"dtype": target, "shape": list(entry.shape), "bytes": after}, None, None, None, None,
    )  # fmt: skip
