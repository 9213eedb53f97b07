"""Which stored tensors are packed, from headers alone: the weights of linear layers, or the codes of quantized ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tersor.formats import low_rank
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseTensor, DenseView
from tersor.formats.errors import TersorError
from tersor.formats.header import DTYPE_BYTES
from tersor.formats.sparse.packed import Packed
from tersor.ops.model.patterns import Pattern, parse_pattern
from tersor.ops.model.selection import (
    Linear,
    Selection,
    check_policy,
    compile_patterns,
    load_policy,
    policy_for,
    select,
)
from tersor.ops.sparsify.formats import Format, parse_format
from tersor.ops.sparsify.request import Request

POLICY_TYPES = {"pattern": str, "sparsity": (int, float), "format": str, "keep": bool}
OTHER_COMMANDS = ("scheme", "group_size", "symmetric")  # one policy can serve several


@dataclass(frozen=True)
class Target:
    """A linear layer and the stored tensor of it that has the zeros: `template` describes that, not yet its format."""

    linear: Linear
    template: Packed
    others_nbytes: int  # of the layer's other tensors: scales, zero points
    pattern: Pattern | None
    sparsity: float
    format: Format

    @property
    def name(self) -> str:
        """The dense weight."""
        return self.linear.name

    @property
    def stored(self) -> str:
        return self.template.name


@dataclass
class Targets:
    """By dense weight name; `kept` says of every other dense tensor why it is copied."""

    found: dict[str, Target]
    kept: dict[str, str]
    warnings: list[str]


def find_targets(checkpoint: Checkpoint, request: Request) -> Targets:
    """Raises TersorError for a pattern that a layer does not admit, a policy that fits nothing, or when nothing is left."""
    low_rank.refuse(checkpoint, "factors have no zeros to pack")
    view = DenseView(checkpoint)
    pattern = None if request.pattern is None else parse_pattern(request.pattern)
    format = parse_format(request.format)
    if pattern is not None and view.is_quantized:
        raise TersorError(
            f"{checkpoint.path}: is quantized, and --pattern chooses among weights",
            "make the pattern first (tersor sparsify or prune --pattern), then quantize, then sparsify without --pattern",
        )
    linears, reasons = _linears(checkpoint, view, request)
    policy = load_policy(request.policy)
    result = Targets({}, reasons, check_policy(policy, checkpoint, Selection(linears, reasons)) if policy else [])
    for name, linear in linears.items():
        settings = _settings(policy_for(policy, name), name)
        if settings.get("keep"):
            reasons[name] = "kept as it is by the policy"
            continue
        template = _template(checkpoint, view, linear, view.tensors[name])
        if isinstance(template, str):
            reasons[name] = template
            continue
        own = parse_pattern(settings["pattern"]) if "pattern" in settings else pattern
        sparsity = _sparsity(own, settings.get("sparsity", request.sparsity))
        misfit = own and own.misfit(linear.shape)
        if misfit:
            raise TersorError(
                f"{name}: --pattern {settings.get('pattern', request.pattern)} does not fit, {misfit}",
                "choose another pattern, or leave the tensor out with --exclude",
            )
        others = sum(checkpoint.tensors[part].nbytes for part in view.stored_names(name) if part != template.name)
        chosen = parse_format(settings["format"]) if "format" in settings else format
        result.found[name] = Target(linear, template, others, own, sparsity, chosen)
    if not result.found:
        raise TersorError(
            f"{checkpoint.path}: no tensor is left to sparsify", "check --include, --exclude and --policy"
        )
    return result


def _linears(checkpoint: Checkpoint, view: DenseView, request: Request) -> tuple[dict[str, Linear], dict[str, str]]:
    """The layers to work on by dense weight name, and why every other dense tensor is left alone."""
    if not view.is_quantized:
        selection = select(checkpoint, request.include, request.exclude)
        linears = selection.linears
        return linears, {name: selection.why_kept(name) for name in view.tensors if name not in linears}
    included = compile_patterns(request.include, "--include")
    excluded = compile_patterns(request.exclude, "--exclude")
    for patterns, option in ((included, "--include"), (excluded, "--exclude")):
        for pattern in patterns:
            if not any(pattern.search(name) for name in view.tensors):
                raise TersorError(
                    f"{option} {pattern.pattern!r} matches no tensor of {checkpoint.path}",
                    f"names look like {next(iter(view.tensors))!r}",
                )
    linears, reasons = {}, {}
    for name, entry in view.tensors.items():
        if entry.scheme is None:
            reasons[name] = "not quantized, so left out before"
        elif included and not any(pattern.search(name) for pattern in included):
            reasons[name] = "not matched by --include"
        elif any(pattern.search(name) for pattern in excluded):
            reasons[name] = "matched by --exclude"
        else:
            shape = entry.shape[::-1] if entry.transposed else entry.shape
            linears[name] = Linear(name, entry.module, shape, entry.dtype, entry.transposed)
    return linears, reasons


def _template(checkpoint: Checkpoint, view: DenseView, linear: Linear, entry: DenseTensor) -> Packed | str:
    """The stored tensor with the zeros of `linear`, or why it has none that can be packed."""
    scheme, (out, columns) = entry.scheme, linear.shape
    if scheme is None:
        info = checkpoint.tensors[linear.name]
        if DTYPE_BYTES[info.dtype] > 4:
            return f"dtype {info.dtype} is not packed"
        bits = 8 * DTYPE_BYTES[info.dtype]
        return Packed(linear.name, "", info.dtype, info.shape, out, columns, bits, 0, linear.transposed)
    zero: int | str = 0
    name = view.codes_name(linear.name)
    info = checkpoint.tensors[name]
    in_words = info.dtype == "I32"
    if not scheme.symmetric:
        if name.endswith(".qweight") or f"{entry.module}.weight_g_idx" in checkpoint.tensors:
            return "zero points that differ from group to group are read for compressed-tensors only"
        zero = "zero_point"
    elif in_words:
        zero = 1 << (scheme.bits - 1)
    bits = scheme.bits if in_words else 8
    return Packed(name, "", info.dtype, info.shape, out, columns, bits, 0, name.endswith(".qweight"), zero)


def repacked(packed: Packed) -> Target:
    """A dense weight that came packed and was left out, for when its channels move all the same: its zeros, packed anew."""
    linear = Linear(packed.name, packed.module, (packed.rows, packed.columns), packed.dtype, packed.transposed)
    return Target(linear, replace(packed, format="", count=0, tile=None), 0, None, 0.0, Format(None, goal="size"))


def _settings(settings: dict, name: str) -> dict:
    settings = {key: value for key, value in settings.items() if key not in OTHER_COMMANDS}
    for key, value in settings.items():
        if key not in POLICY_TYPES:
            raise TersorError(f"policy for {name}: unknown key {key!r}", f"known: {' '.join(POLICY_TYPES)}")
        if not isinstance(value, POLICY_TYPES[key]) or (isinstance(value, bool) and key != "keep"):
            raise TersorError(f"policy for {name}: {key} is {value!r}", "see tersor sparsify --help for what it may be")
    return settings


def _sparsity(pattern: Pattern | None, wanted: float | None) -> float:
    """The share of zeros that a pattern is to make."""
    if pattern is None:
        if wanted is not None:
            raise TersorError(
                f"--sparsity {wanted} makes zeros, but where?",
                "add --pattern: unstructured, 2:4, vector:32x1 or block:16x16",
            )
        return 0.0
    fixed = pattern.sparsity
    if wanted is None:
        return 0.5 if fixed is None else fixed
    if not 0 <= wanted < 1:
        raise TersorError(f"--sparsity {wanted} is not in [0, 1)", "0.5 makes half of the weights zero")
    if fixed is not None and abs(wanted - fixed) > 1e-6:
        raise TersorError(
            f"the pattern makes {fixed:.1%} zeros, --sparsity asks for {wanted:.1%}", "leave --sparsity out"
        )
    return float(wanted)
