"""How many rows of the vocabulary stay, and which tensors and settings have one row or id per token."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.prune.plan import Action, Plan, keep
from tersor.ops.prune.request import Request
from tersor.ops.prune.vocab.choose import choose_tokens
from tersor.ops.prune.vocab.token_ids import find_ids, map_ids
from tersor.ops.prune.vocab.vocabulary import Vocabulary

SETTINGS = ("generation_config.json", "tokenizer_config.json")


@dataclass
class Details:
    vocabulary: Vocabulary
    rows: int
    room: int
    axes: dict[str, int]  # checkpoint tensor -> axis with an entry per token
    paths: list[tuple[str, ...]]  # of the vocabulary's size in config.json
    essential: set[int]
    settings: dict[str, dict]  # JSON files that hold ids
    kept: list[int] = field(default_factory=list)
    files: dict[str, dict] = field(default_factory=dict)  # to be written
    quality: dict = field(default_factory=dict)

    @property
    def numbers(self) -> dict[int, int]:
        """Old id -> new id."""
        return {number: place for place, number in enumerate(self.kept)}

    def choose(self, counts: dict[int, int]) -> list[int]:
        tokens = set(self.vocabulary.tokens)
        return choose_tokens(counts, tokens, self.essential, self.vocabulary.closure, self.room, self.rows)


def plan(checkpoint: Checkpoint, request: Request) -> Plan:
    """Raises TersorError without a tokenizer.json, or when more tokens have to stay than are left."""
    if request.include or request.exclude:
        raise TersorError("--include and --exclude choose no tokens", "leave them out")
    config = checkpoint.require_config("which holds the size of the vocabulary")
    vocabulary = Vocabulary(checkpoint.path)
    settings = {name: _load(checkpoint, name) for name in SETTINGS if (checkpoint.path / name).is_file()}
    details = _graph(checkpoint, config, vocabulary, settings, request)
    return assemble(checkpoint, details)


def _load(checkpoint: Checkpoint, name: str) -> dict:
    try:
        value = json.loads((checkpoint.path / name).read_text("utf-8"))
        find_ids(value)
    except (OSError, ValueError, RecursionError) as error:
        raise TersorError(f"{checkpoint.path / name}: not readable ({error})", "save or download it again") from error
    return value


def _graph(
    checkpoint: Checkpoint, config: dict, vocabulary: Vocabulary, settings: dict[str, dict], request: Request
) -> Details:
    from tersor.ops.model.resize import build_meta, resize, shapes_of, sources_of

    model = build_meta(checkpoint, config)
    shapes, sources = shapes_of(model), sources_of(checkpoint, model)
    table = next((name for name, parameter in model.named_parameters() if parameter is _embedding(model)), None)
    if table is None:
        raise TersorError(f"{checkpoint.path}: {type(model).__name__} has no token embeddings", "it has no vocabulary")
    rows = shapes[table][0]
    if max(vocabulary.tokens) >= rows:
        raise TersorError(
            f"{checkpoint.path}: tokenizer.json has token {max(vocabulary.tokens)}, {table} only {rows} rows",
            "the tokenizer does not belong to this model",
        )
    room = _room(rows, request)
    used = {number for part in (config, *settings.values()) for number in find_ids(part) if 0 <= number < rows}
    details = Details(vocabulary, rows, room, {}, [], vocabulary.essential | used, settings)
    if room == rows:
        details.kept = list(range(rows))
        return details
    try:
        details.kept = details.choose({})  # which ones is decided by the text; their number is not
    except ValueError as error:
        must = int(str(error).split()[0])
        raise TersorError(
            f"--sparsity {request.sparsity} leaves {room} of {rows} tokens, and {error}: special tokens, single "
            "characters and bytes, and what these are made of",
            f"--sparsity {max(0.0, 1 - must / rows):.3g} is the most",
        ) from error
    found = resize(checkpoint, shapes, rows, room, lambda axes: axes.get(table) == 0, map_ids(config, details.numbers))
    if found is None:
        raise TersorError(
            f"{checkpoint.path}: no number of config.json gives a model with {room} instead of {rows} tokens",
            "the vocabulary of this architecture cannot be cut",
        )
    details.paths = found.paths
    details.axes = {
        name: found.axes[source.parameter] for name, source in sources.items() if source.parameter in found.axes
    }
    return details


def _embedding(model):
    module = model.get_input_embeddings()
    return getattr(module, "weight", None)


def _room(rows: int, request: Request) -> int:
    removed = int(rows * request.sparsity + 1e-9)  # never more than was asked for
    if request.sparsity and not removed:
        raise TersorError(f"--sparsity {request.sparsity} of {rows} tokens is less than one", "give more")
    room = min(-(-(rows - removed) // request.multiple_of) * request.multiple_of, rows)
    if request.sparsity and room == rows:
        raise TersorError(
            f"--multiple-of {request.multiple_of} leaves all {rows} tokens", "lower it, or raise --sparsity"
        )
    return room


def assemble(checkpoint: Checkpoint, details: Details) -> Plan:
    """What becomes of every tensor, and of config.json, once it is known which tokens stay."""
    steps = Plan(details=details)
    for name, info in checkpoint.tensors.items():
        axis = details.axes.get(name)
        if axis is None:
            steps.actions[name] = keep(checkpoint, name, "no entry per token")
            continue
        shape = list(info.shape)
        shape[axis] = details.room
        reason = f"{details.room} of {details.rows} tokens stay"
        steps.actions[name] = Action("slice", reason, {name: (info.dtype, tuple(shape))})
    if details.paths:
        config = map_ids(checkpoint.config, details.numbers)
        for *above, last in details.paths:
            part = config
            for key in above:
                part = part[key]
            part[last] = details.room
        steps.config = {key: value for key, value in config.items() if value != checkpoint.config[key]}
    return steps
