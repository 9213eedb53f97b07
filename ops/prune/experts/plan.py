"""How many experts stay, which tensors that touches, and which number of config.json tells loaders.

The layers are found from the model's own code: its expert modules are those that ask for the tokens' routing, and the
router is whatever changes its shape with them when the model is built with fewer experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import FLOAT_DTYPES
from tersor.ops.prune.plan import Action, Plan, keep
from tersor.ops.prune.request import Request

if TYPE_CHECKING:
    from torch import nn

PROBE = "tersor-probe"
PROBE_TOKENS = 1009  # a prime, so that groups which do not divide the experts cannot divide their product either


@dataclass
class Layer:
    """One mixture-of-experts layer. `module` is its experts module in transformers, names are those of the checkpoint."""

    module: str
    numbered: dict[str, int] = field(default_factory=dict)  # tensor of one expert -> expert
    stacked: dict[str, int] = field(default_factory=dict)  # tensor of all experts, or the router's -> axis of experts
    router: set[str] = field(default_factory=set)
    kept: list[int] = field(default_factory=list)
    merged: dict[int, list[int]] = field(default_factory=dict)  # kept expert -> experts averaged into it
    shares: dict[int, float] = field(default_factory=dict)  # expert -> weight in that average

    def parts(self, expert: int) -> list[int]:
        """The experts that make up a kept one, itself first."""
        return [expert, *self.merged.get(expert, [])]


@dataclass
class Details:
    layers: list[Layer]
    count: int
    kept: int
    key: str
    quality: dict = field(default_factory=dict)


def plan(checkpoint: Checkpoint, request: Request) -> Plan:
    """Raises TersorError for a model without experts, or when routing cannot work with those that are left."""
    if request.include or request.exclude:
        raise TersorError(
            "--include and --exclude choose no experts: config.json has one number of experts for all layers",
            "leave them out",
        )
    config = checkpoint.require_config("which holds the number of experts")
    if not any("expert" in key or "moe" in key for key in _keys(config)):
        raise TersorError(
            f"{checkpoint.path}: has no experts", "--remove neurons cuts the feed-forward of a dense model"
        )
    layers, key, changes, count, kept = _graph(checkpoint, request)
    details = Details(layers, count, kept, key)
    for layer in layers:
        layer.kept = list(range(kept))  # which ones is decided by the calibration text; their number is not
    steps = assemble(checkpoint, details)
    steps.config = changes
    return steps


def assemble(checkpoint: Checkpoint, details: Details) -> Plan:
    """What becomes of every tensor once it is known which experts stay."""
    steps = Plan(details=details)
    owner = {name: layer for layer in details.layers for name in (*layer.numbered, *layer.stacked)}
    for name, info in checkpoint.tensors.items():
        layer = owner.get(name)
        if layer is None or details.kept == details.count:
            steps.actions[name] = keep(checkpoint, name, "no part of it belongs to one expert")
        elif name in layer.stacked:
            shape = list(info.shape)
            shape[layer.stacked[name]] = details.kept
            reason = f"{details.kept} of {details.count} experts stay"
            steps.actions[name] = Action("slice", reason, {name: (info.dtype, tuple(shape))})
        else:
            steps.actions[name] = _numbered(name, layer, info)
    return steps


def _numbered(name: str, layer: Layer, info) -> Action:
    expert = layer.numbered[name]
    if expert not in layer.kept:
        into = next((target for target, parts in layer.merged.items() if expert in parts), None)
        return Action("drop", "removed" if into is None else f"merged into expert {into}", {})
    place = layer.kept.index(expert)
    merged = layer.merged.get(expert)
    reason = f"expert {expert} is number {place} now" + (f", with {len(merged)} merged into it" if merged else "")
    return Action("move", reason, {renumbered(name, expert, place): (info.dtype, info.shape)})


def renumbered(name: str, expert: int, place: int) -> str:
    head, _, tail = name.partition(f".experts.{expert}.")
    return f"{head}.experts.{place}.{tail}"


def _keys(config: dict) -> list[str]:
    nested = (value for value in config.values() if isinstance(value, dict))
    return [*config, *(key for part in nested for key in part)]


def _graph(checkpoint: Checkpoint, request: Request) -> tuple[list[Layer], str, dict, int, int]:
    from tersor.ops.model.resize import build_meta, resize, shapes_of, sources_of

    model = build_meta(checkpoint, checkpoint.config)
    modules, wanted = probe(checkpoint, model)
    if not modules:
        raise TersorError(
            f"{checkpoint.path}: {type(model).__name__} has no experts module that transformers routes tokens to",
            "--remove neurons cuts the feed-forward layers",
        )
    counts = {model.get_submodule(name).num_experts for name in modules}
    if len(counts) != 1:
        raise TersorError(
            f"{checkpoint.path}: layers have different numbers of experts ({sorted(counts)})", "this is not supported"
        )
    count = counts.pop()
    kept = _kept(count, request)
    if kept < wanted:
        raise TersorError(
            f"--sparsity {request.sparsity} leaves {kept} of {count} experts, and each token takes {wanted}",
            f"--sparsity {1 - wanted / count:.3g} is the most",
        )
    shapes, sources = shapes_of(model), sources_of(checkpoint, model)
    inside = tuple(f"{name}." for name in modules)
    fused = {name for name in shapes if name.startswith(inside)}
    if kept == count:
        return [Layer(name) for name in modules], "", {}, count, kept
    found = resize(checkpoint, shapes, count, kept, lambda axes: fused <= axes.keys())
    if found is None:
        raise TersorError(
            f"{checkpoint.path}: no number of config.json gives a model with {kept} instead of {count} experts",
            "the experts of this architecture cannot be cut",
        )
    key = ".".join(found.paths[0])
    try:
        probe(checkpoint, build_meta(checkpoint, {**checkpoint.config, **found.config}))
    except TersorError as error:
        raise TersorError(
            f"{checkpoint.path}: the router does not work with {key} {kept} instead of {count} ({error})",
            "choose a --sparsity that leaves a multiple of the expert groups, see --multiple-of",
        ) from error
    return _layers(checkpoint, modules, sources, found.axes), key, found.config, count, kept


def _kept(count: int, request: Request) -> int:
    removed = int(count * request.sparsity + 1e-9)  # never more than was asked for
    if request.sparsity and not removed:
        raise TersorError(
            f"--sparsity {request.sparsity} of {count} experts is less than one", f"give at least {1 / count:.3g}"
        )
    kept = count - removed
    kept = min(-(-kept // request.multiple_of) * request.multiple_of, count)
    if request.sparsity and kept == count:
        raise TersorError(
            f"--multiple-of {request.multiple_of} leaves all {count} experts", "lower it, or raise --sparsity"
        )
    return kept


def probe(checkpoint: Checkpoint, model: nn.Module) -> tuple[list[str], int]:
    """Run the model without weights: its experts modules in order, and how many experts a token takes.

    Raises TersorError when its code does not run: too few experts for top-k, or groups that do not divide them.
    """
    import torch
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    routed: dict[nn.Module, int] = {}

    def forward(self, hidden_states, top_k_index, top_k_weights):
        routed[self] = top_k_index.shape[-1]
        return torch.zeros_like(hidden_states)

    ALL_EXPERTS_FUNCTIONS.register(PROBE, forward)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = PROBE
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # whatever the model's code raises
        raise TersorError(
            f"{checkpoint.path}: the routing of {type(model).__name__} cannot be followed "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})",
            "its experts cannot be cut",
        ) from error
    names = [name for name, module in model.named_modules() if module in routed]
    return names, max(routed.values(), default=0)


def _layers(checkpoint: Checkpoint, modules: list[str], sources: dict, axes: dict[str, int]) -> list[Layer]:
    """The tensors of each layer. Raises TersorError for one that belongs to none."""
    layers = {name: Layer(name) for name in modules}
    for tensor, source in sources.items():
        if source.parameter not in axes:
            continue
        # The router is beside its experts: the module that shares the longest path.
        shared = {name: _shared_path(name.split("."), source.parameter.split(".")) for name in modules}
        best = max(shared.values())
        owners = [name for name in modules if shared[name] == best]
        if len(owners) != 1 or checkpoint.tensors[tensor].dtype not in FLOAT_DTYPES:
            raise TersorError(
                f"{tensor}: depends on the number of experts in a way that is not known", "keep the experts"
            )
        layer = layers[owners[0]]
        if source.expert is None:
            layer.stacked[tensor] = axes[source.parameter]
            if not source.parameter.startswith(f"{layer.module}."):
                layer.router.add(tensor)
        else:
            layer.numbered[tensor] = source.expert
    for layer in layers.values():
        if not layer.router:
            raise TersorError(f"{layer.module}: no router was found beside these experts", "keep the experts")
    return list(layers.values())


def _shared_path(left: list[str], right: list[str]) -> int:
    """How many parts two module paths have in common from the start."""
    return next((place for place, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), len(left))
