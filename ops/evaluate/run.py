"""`evaluate`: perplexity on a text, and how far two models are from each other on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.locate import locate
from tersor.formats.report import Report
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.model.blocks import BlockPass
from tersor.ops.model.calibration import encode, load_tokenizer, special_tokens
from tersor.ops.model.device import pick_device
from tersor.ops.model.input_thresholds import traffic
from tersor.ops.model.memory import parking_space
from tersor.ops.model.skeleton import Skeleton
from tersor.ops.model.spill import SpillPool
from tersor.ops.model.text import SHIPPED, load_text

IGNORED = -100


@dataclass
class Request:
    model: str
    text: str | None = None
    seq_len: int = 2048
    stride: int | None = None
    max_windows: int | None = None
    compare: str | None = None
    device: str = "auto"
    max_memory_bytes: int | None = None

    def arguments(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "model"}


def evaluate(request: Request, progress: Callable[[str, int, int], None] = lambda stage, done, total: None) -> Report:
    """Perplexity of `request.model`; with `compare`, also KL divergence and top-1 agreement. Raises TersorError."""
    checkpoint = open_checkpoint(locate(request.model))
    checkpoint.require_config("which evaluate needs to run the model")
    device = pick_device(request.device)
    report = Report.start(
        "evaluate", request.arguments(), 0, str(device), checkpoint, Report.history_of(checkpoint.path)
    )
    windows, targets, stride = cut_targets(checkpoint.path, request)
    model = _run_blocks(checkpoint, windows, device, request.max_memory_bytes, progress, "blocks")
    other = None
    if request.compare is not None:
        reference = open_checkpoint(locate(request.compare))
        reference.require_config("which evaluate needs to run the model")
        other = _run_blocks(reference, windows, device, request.max_memory_bytes, progress, "blocks of the other model")
    report.quality = {
        "text": request.text or SHIPPED,
        "window_tokens": windows.shape[1],
        "stride_tokens": stride,
        "windows": len(windows),
        **_score(model, other, targets, progress),
    }
    if model.skeleton.thresholds:
        report.quality["activation_sparsity"] = traffic(model.skeleton, model.skeleton.input_counts, windows.numel())
    if request.compare is not None:
        report.quality["compared_with"] = request.compare
    report.finish(checkpoint)
    return report


def require_report(folder: Path) -> None:
    """Before the work: raises TersorError when `record` would find no report to add to."""
    if not (folder / "report.json").is_file():
        raise TersorError(
            f"{folder}: has no report.json to record into", "leave --record out, or use --json to keep the result"
        )
    Report.load(folder)


def record(report: Report, folder: Path) -> None:
    """Put the quality into the report that travels with the checkpoint."""
    own = Report.load(folder)
    for key, value in report.quality.items():
        known = own.quality.get(key)
        own.quality[key] = known | value if isinstance(value, dict) and isinstance(known, dict) else value
    own.write(folder)


def cut_targets(model: Path, request: Request) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Windows `[n, seq_len]`, what is scored in them (`targets[:, t]`: the token after position t, or IGNORED), stride.

    Windows start every `stride` text tokens; a token that an earlier window has scored is context only.
    """
    tokenizer = load_tokenizer(model)
    before, after = special_tokens(tokenizer)
    tokens = encode(tokenizer, load_text(request.text))
    body = request.seq_len - len(before) - len(after)
    stride = request.stride or body
    if not 0 < stride <= body:
        raise TersorError(f"--stride {stride} does not fit a window of {body} text tokens", f"choose 1 … {body}")
    if len(tokens) < body:
        raise TersorError(
            f"{request.text or SHIPPED} has {len(tokens)} tokens, one window takes {body}",
            "give a longer text, or lower --seq-len",
        )
    starts = list(range(0, len(tokens) - body + 1, stride))[: request.max_windows]
    windows = torch.tensor([before + tokens[start : start + body] + after for start in starts])
    targets = torch.full_like(windows, IGNORED)
    targets[:, :-1] = windows[:, 1:]
    for row, start in enumerate(starts):
        scored = starts[row - 1] + body if row else 0  # text tokens before this one are done
        targets[row, : max(0, len(before) - 1)] = IGNORED
        first = len(before) + max(scored - start, 0) - 1  # position whose next token is the first new one
        targets[row, : max(first, 0)] = IGNORED
        if after:
            targets[row, -len(after) - 1 :] = IGNORED
    return windows, targets, stride


def _require_head(skeleton: Skeleton, path: Path) -> None:
    """Raises TersorError for a model that does not predict the next token, or whose head is not in the checkpoint."""
    model = skeleton.model
    head = model.get_output_embeddings() if model.can_generate() else None
    if head is None:
        raise TersorError(
            f"{path}: a {type(model).__name__} does not predict the next token",
            "perplexity needs a causal language model",
        )
    name = next(name for name, module in model.named_modules() if module is head) + ".weight"
    if name not in skeleton.by_parameter and head.weight is not model.get_input_embeddings().weight:
        raise TersorError(
            f"{path}: tensor {name!r} is missing, and config.json does not tie it to the embeddings",
            "the checkpoint holds the body of a model only: add its head",
        )


def _run_blocks(checkpoint, windows, device, max_memory_bytes, progress, stage: str) -> BlockPass:
    skeleton = Skeleton(DenseView(checkpoint), device)
    _require_head(skeleton, checkpoint.path)
    embeddings = skeleton.model.get_input_embeddings().weight.shape[0]
    if int(windows.max()) >= embeddings:
        raise TersorError(
            f"{checkpoint.path}: has {embeddings} embeddings, the text needs token {int(windows.max())}",
            "the models to compare must share a tokenizer",
        )
    run = BlockPass(skeleton, windows, SpillPool(parking_space(max_memory_bytes, skeleton)))
    for index in range(len(run)):
        progress(stage, index, len(run))
        with skeleton.filled(index) as block:
            run.run(index, block)
    progress(stage, len(run), len(run))
    return run


@torch.no_grad()
def _score(model: BlockPass, other: BlockPass | None, targets: torch.Tensor, progress) -> dict:
    loss = other_loss = divergence = 0.0
    agree = count = row = 0
    for batch, ids in enumerate(model.batches):
        progress("logits", batch, len(model.batches))
        wanted = targets[row : row + len(ids)].to(ids.device)
        row += len(ids)
        chunks = model.logits(batch)
        others = other.logits(batch) if other else None
        for positions, logits in chunks:
            label = wanted[:, positions]
            keep = label != IGNORED
            reference = next(others)[1] if others else None
            if not bool(keep.any()):
                continue
            p = torch.log_softmax(logits[keep].float(), dim=-1)
            loss -= float(p.gather(1, label[keep][:, None]).double().sum())
            count += int(keep.sum())
            if reference is None:
                continue
            q = torch.log_softmax(reference[keep].float(), dim=-1)
            shared = min(p.shape[1], q.shape[1])  # vocabularies padded to different lengths
            other_loss -= float(q.gather(1, label[keep][:, None]).double().sum())
            divergence += float((q[:, :shared].exp() * (q[:, :shared] - p[:, :shared])).double().sum())
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        for rest in (chunks, others):
            for _ in rest or ():
                pass
    progress("logits", len(model.batches), len(model.batches))
    quality = {"tokens": count, "perplexity": _perplexity(loss, count)}
    if other is not None:
        quality |= {
            "compared_perplexity": _perplexity(other_loss, count),
            "kl_divergence": divergence / count,
            "top1_agreement": agree / count,
        }
    return quality


def _perplexity(loss: float, count: int) -> float:
    return math.exp(min(loss / count, 700.0)) if math.isfinite(loss) else math.inf
