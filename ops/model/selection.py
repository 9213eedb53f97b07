"""Which tensors a command works on, decided from headers alone so that --dry-run and the run agree.

The rule is structural, not a table of architectures: a linear layer is a 2-D `.weight` inside a repeated block, that is
not a router, an embedding, a norm or a convolution. What lies outside the blocks (embeddings, output head, pooler) is
left alone unless --include names it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.conv1d import is_transposed
from tersor.formats.errors import TersorError
from tersor.formats.header import FLOAT_DTYPES
from tersor.formats.json_file import read_object

NOT_LINEAR = re.compile(r"embed|wte$|wpe$|norm|(^|[._])ln[._\d]|conv|rotary|position|relative|bias")
TOWERS = re.compile(r"(^|\.)(vision|visual|image|audio|speech)\w*\.")
SMALLEST_SIDE = 16


@dataclass(frozen=True)
class Linear:
    """A linear layer of a checkpoint. `shape` is `[out, in]`, also where the file holds the transpose."""

    name: str
    module: str
    shape: tuple[int, int]
    dtype: str
    transposed: bool


# Output heads by the names transformers gives them. A tied head has no tensor to be found by, yet a loader meets its layer.
HEADS = {
    "": ["lm_head"],
    "MaskedLM": ["cls.predictions.decoder", "lm_head.decoder", "vocab_projector", "predictions.decoder"],
}


@dataclass
class Selection:
    """The layers to work on, and for every other tensor of two or more dimensions why it is left alone."""

    linears: dict[str, Linear] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    dense_modules: list[str] = field(default_factory=list)  # linear layers that stay as they are, tied heads included
    # Not linear by their names. Names can lie (GPT-NeoX's head is `embed_out`), so whoever lists what is dense adds them.
    tables: list[str] = field(default_factory=list)

    def why_kept(self, name: str) -> str:
        return self.reasons.get(name, "fewer than two dimensions")


def tied_heads(checkpoint: Checkpoint) -> list[str]:
    """Linear layers that the model has though the checkpoint holds no tensor for them."""
    architecture = ((checkpoint.config or {}).get("architectures") or [""])[0]
    return [head for kind, heads in HEADS.items() if kind in architecture for head in heads]


def compile_patterns(patterns: list[str] | None, option: str) -> list[re.Pattern]:
    try:
        return [re.compile(pattern) for pattern in patterns or []]
    except re.error as error:
        raise TersorError(
            f"{option}: {error.pattern!r} is not a regular expression ({error})", "see Python's re"
        ) from error


def select(checkpoint: Checkpoint, include: list[str] | None = None, exclude: list[str] | None = None) -> Selection:
    """Split the tensors by the rule above and by the user's patterns, which are searched in tensor names."""
    included, excluded = compile_patterns(include, "--include"), compile_patterns(exclude, "--exclude")
    routers = _routers(checkpoint)
    multimodal = any(key in (checkpoint.config or {}) for key in ("vision_config", "audio_config"))
    result = Selection()
    for name, info in checkpoint.tensors.items():
        if len(info.shape) < 2:
            continue
        reason = _not_linear(name, info.shape)
        named = any(pattern.search(name) for pattern in included)
        module = name.removesuffix(".weight")
        if reason is None:
            transposed = is_transposed(checkpoint, name)
            outside = not re.search(r"\.\d+\.", name)
            if info.dtype not in FLOAT_DTYPES:
                reason = f"dtype {info.dtype} is not a plain float"
            elif min(info.shape) < SMALLEST_SIDE:
                reason = f"a side is shorter than {SMALLEST_SIDE}"
            elif name in routers:
                reason = "router: small, and its errors change which expert runs"
            elif outside and not named:
                reason = "outside the repeated blocks"
            elif multimodal and TOWERS.search(name) and not named:
                reason = "vision or audio tower; --include it to have it"
            elif included and not named:
                reason = "not matched by --include"
            elif any(pattern.search(name) for pattern in excluded):
                reason = "matched by --exclude"
            if reason is None:
                shape = info.shape[::-1] if transposed else info.shape
                result.linears[name] = Linear(name, module, shape, info.dtype, transposed)
                continue
            result.dense_modules.append(module)
        elif name.endswith(".weight") and len(info.shape) == 2:
            result.tables.append(module)
        result.reasons[name] = reason
    result.dense_modules += [head for head in tied_heads(checkpoint) if f"{head}.weight" not in checkpoint.tensors]
    for patterns, option in ((included, "--include"), (excluded, "--exclude")):
        for pattern in patterns:
            if not any(pattern.search(name) for name in checkpoint.tensors):
                raise TersorError(
                    f"{option} {pattern.pattern!r} matches no tensor of {checkpoint.path}",
                    f"names look like {next(iter(checkpoint.tensors), '(none)')!r}",
                )
    return result


def _not_linear(name: str, shape: tuple[int, ...]) -> str | None:
    if len(shape) > 2:
        return f"{len(shape)}-D tensor: only 2-D linear layers are handled"
    if not name.endswith(".weight"):
        return "not the weight of a linear layer"
    if NOT_LINEAR.search(name.removesuffix(".weight").rsplit(".", 1)[-1]):
        return "embedding, norm or convolution"
    return None


def _routers(checkpoint: Checkpoint) -> set[str]:
    """Weights `[experts, hidden]` beside a list of that many experts."""
    experts: dict[str, set[str]] = defaultdict(set)
    for name in checkpoint.tensors:
        if found := re.match(r"(.*)\.experts\.(\d+)\.", name):
            experts[found[1]].add(found[2])
    return {
        name
        for name, info in checkpoint.tensors.items()
        if len(info.shape) == 2
        and len(experts.get(name.rsplit(".", 2)[0], ())) == info.shape[0]
        and ".experts." not in name
    }


def load_policy(path: Path | None) -> list[tuple[re.Pattern, dict]]:
    """Per-tensor settings: `{"schema": "tersor.policy/1", "tensors": {"<regex>": {"scheme": …, "group_size": …}}}`.

    A pattern must match the whole tensor name; the last match wins. `{"keep": true}` leaves a tensor dense.
    """
    if path is None:
        return []
    content = read_object(path, "see the README for the policy format")
    if content.get("schema") != "tersor.policy/1":
        raise TersorError(f"{path}: not a policy", 'it should start with {"schema": "tersor.policy/1", "tensors": …}')
    entries = content.get("tensors")
    if not isinstance(entries, dict) or not all(isinstance(settings, dict) for settings in entries.values()):
        raise TersorError(f"{path}: 'tensors' is not an object of objects", "see the README for the policy format")
    patterns = compile_patterns(list(entries), f"{path}")
    return list(zip(patterns, entries.values(), strict=True))


def policy_for(policy: list[tuple[re.Pattern, dict]], name: str) -> dict:
    settings: dict = {}
    for pattern, entry in policy:
        if pattern.fullmatch(name):
            settings = entry
    return settings


def check_policy(policy: list[tuple[re.Pattern, dict]], checkpoint: Checkpoint, selection: Selection) -> list[str]:
    """Warnings for patterns that change nothing. Raises TersorError for one that matches no tensor."""
    warnings = []
    for pattern, settings in policy:
        names = [name for name in checkpoint.tensors if pattern.fullmatch(name)]
        if not names:
            raise TersorError(
                f"policy: {pattern.pattern!r} matches no whole tensor name of {checkpoint.path}",
                f"names look like {next(iter(checkpoint.tensors), '(none)')!r}",
            )
        if not settings.get("keep") and not any(name in selection.linears for name in names):
            warnings.append(
                f"policy {pattern.pattern!r} changes nothing: {names[0]} is kept ({selection.why_kept(names[0])})"
            )
    return warnings
