"""What becomes of every tensor when neurons, heads or hidden channels are removed.

The model's own code is asked (it is built without weights, and one block of each kind is run on a few random tokens),
since no name and no header says which rows and columns belong together.
"""

from __future__ import annotations

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.prune.plan import Action, Plan, keep
from tersor.ops.prune.request import Request

DATA_FREE = ("magnitude", "random")
SCORED_BY_GRADIENTS = ("saliency", "taylor")


def plan(checkpoint: Checkpoint, request: Request) -> Plan:
    """Raises TersorError for a request or a model that this target cannot serve."""
    _check(request)
    checkpoint.require_config(f"which --remove {request.remove} needs to run the model")
    import torch
    from tersor.formats.dense import DenseView
    from tersor.ops.model.skeleton import Skeleton
    from tersor.ops.model.units import find_units, reads_text
    from tersor.ops.prune.width.cut import Details

    skeleton = Skeleton(DenseView(checkpoint), torch.device("cpu"))
    text, warnings = reads_text(skeleton), []
    if not text and request.method not in DATA_FREE:
        raise TersorError(
            f"{checkpoint.path}: reads {skeleton.model.main_input_name}, and --method {request.method} measures on text",
            f"--method {' or '.join(DATA_FREE)}",
        )
    repair = request.repair and text and request.remove != "channels"
    if request.repair and not text:
        warnings.append("nothing is refitted: calibration is text, and this model does not read any")
    if request.remove == "channels":
        from tersor.ops.prune.width.channels import plan_channels

        return plan_channels(checkpoint, request, skeleton)
    units = find_units(checkpoint, skeleton, request.remove)
    kept = {count: kept_units(count, request) for count in sorted({group.count for group in units})}
    details = Details(
        request.remove, units, kept, skeleton, repair or (text and request.method == "activation"), repair
    )
    result = Plan(lay_out(checkpoint, request, details), warnings=warnings, details=details)
    if not request.keep_shape:
        result.config = changed_config(checkpoint, details, result)
    return result


def _check(request: Request) -> None:
    if request.multiple_of < 1:
        raise TersorError(f"--multiple-of {request.multiple_of} is not positive", "1 rounds nothing")
    what = f"--remove {request.remove}"
    if request.allocate != "uniform":
        raise TersorError(f"{what}: every layer loses the same number, for config.json has one", "leave out --allocate")
    if request.include or request.exclude or request.policy:
        raise TersorError(
            f"{what}: every layer loses the same number, for config.json has one",
            "leave out --include, --exclude and --policy",
        )
    if request.rounds != 1:
        raise TersorError(f"{what} is done in one round", "leave out --rounds")


def kept_units(count: int, request: Request) -> int:
    """How many of `count` stay. Raises TersorError when nothing would be removed."""
    from tersor.ops.prune.width.cut import kept_count

    kept = kept_count(count, request.sparsity, request.multiple_of)
    if kept == count:
        raise TersorError(
            f"--sparsity {request.sparsity} with --multiple-of {request.multiple_of} removes none of {count} "
            f"{request.remove}",
            f"the smallest share that does is {_smallest(count, request.multiple_of)}"
            if count > request.multiple_of
            else f"--multiple-of below {count}",
        )
    return kept


def _smallest(count: int, multiple_of: int) -> float:
    most = (count - 1) // multiple_of * multiple_of
    return round(1 - most / count + 5e-5, 4)


def lay_out(checkpoint: Checkpoint, request: Request, details) -> dict[str, Action]:
    slots = details.slots()
    actions = {}
    for name, info in checkpoint.tensors.items():
        if name not in slots:
            actions[name] = keep(checkpoint, name, f"holds no {request.remove}")
            continue
        shape = info.shape
        for units, slot in slots[name]:
            shape = slot.shape(shape, details.kept_of(units))
        units = slots[name][0][0]
        reason = f"{details.kept_of(units)} of {units.count} {details.kind} stay"
        if request.keep_shape:
            actions[name] = Action("mask", reason, {name: (info.dtype, info.shape)})
        else:
            actions[name] = Action("slice", reason, {name: (info.dtype, shape)})
    return actions


def changed_config(checkpoint: Checkpoint, details, plan: Plan) -> dict:
    """The entries of config.json to replace."""
    from tersor.ops.model.stream import explicit_head_size
    from tersor.ops.prune.width.config import build, candidates, integers, search

    wanted = _parameter_shapes(checkpoint, details.skeleton, plan)
    settings = build(checkpoint.config, checkpoint).settings
    if details.kind == "neurons":
        return search(checkpoint, {}, list(candidates(settings, details.kept)), wanted, "the intermediate width")
    # Numbers of query heads are multiples of the number of KV heads, which is the number of units.
    widths = {}
    columns = [slot.index.numel() for group in details.units for slot in group.slots if slot.name in group.readers]
    for count, kept in details.kept.items():
        for _, value in integers(settings):
            if type(value) is int and 0 < value <= max(columns) and value % count == 0:
                widths[value] = value // count * kept
    fixed = explicit_head_size(details.skeleton)
    offer = {key: value for key, value in candidates(settings, widths)[0].items() if key not in fixed}
    return search(checkpoint, fixed, [offer], wanted, "the number of heads")


def _parameter_shapes(checkpoint: Checkpoint, skeleton, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that change. transformers stacks the tensors of experts: `[experts, out, in]`."""
    result = {}
    for parameter, names in skeleton.by_parameter.items():
        if all(plan.actions[name].action == "keep" for name in names):
            continue
        shapes = [plan.actions[name].outputs[name][1] for name in names]
        if skeleton.sources[names[0]].expert is None:
            result[parameter] = tuple(shapes[0])
            continue
        first = [
            shape for name, shape in zip(names, shapes, strict=True) if skeleton.sources[name].expert == 0
        ]  # gate and up lie one after the other
        experts = 1 + max(skeleton.sources[name].expert for name in names)
        result[parameter] = (experts, sum(shape[0] for shape in first), *first[0][1:])
    return result
