"""What happens to each tensor and why, decided from headers alone: --dry-run prints it, the run executes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tersor.formats import encodings
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import tensor_bytes
from tersor.formats.scheme import Scheme
from tersor.formats.writer import Layout
from tersor.ops.model.selection import Linear, policy_for, select
from tersor.ops.quantize.schemes import fit_group, scheme_from_name

SCALE_DTYPES = {"compressed-tensors": {"F16": "F16", "BF16": "BF16", "F32": "F32", "F64": "F32"}}
VLLM_GROUPS = (32, 64, 128)


@dataclass
class Step:
    """One quantized layer: which scheme, stored as which tensors."""

    linear: Linear
    scheme: Scheme
    scale_dtype: str
    layout: Layout
    reason: str

    @property
    def nbytes(self) -> int:
        return sum(tensor_bytes(*entry) for entry in self.layout.values())


@dataclass
class Plan:
    format: str
    steps: dict[str, Step] = field(default_factory=dict)  # by dense tensor name
    kept: dict[str, str] = field(default_factory=dict)  # every other tensor -> why
    dense_modules: list[str] = field(default_factory=list)
    layout: Layout = field(default_factory=dict)  # the whole output, in the order of the input
    warnings: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor_bytes(*entry) for entry in self.layout.values())

    def quantization_config(self) -> dict:
        schemes = {step.linear.module: step.scheme for step in self.steps.values()}
        return encodings.encoding(self.format).quantization_config(schemes, self.dense_modules)


def choose_format(checkpoint: Checkpoint, requested: str) -> str:
    """`auto` is compressed-tensors, except for Conv1D families, which only the GPTQ loaders know."""
    from tersor.formats.conv1d import CONV1D_FAMILIES

    conv1d = (checkpoint.config or {}).get("model_type") in CONV1D_FAMILIES
    if requested == "auto":
        return "gptq" if conv1d else "compressed-tensors"
    return requested


def build_plan(
    checkpoint: Checkpoint,
    scheme: Scheme,
    format: str = "auto",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    policy: list | None = None,
    strict: bool = False,
) -> Plan:
    """Raises TersorError when the input is quantized already, nothing is selected, or `strict` forbids a fallback."""
    if encodings.detect(checkpoint.config, checkpoint.tensors) is not None:
        raise TersorError(
            f"{checkpoint.path}: is quantized already", "make it dense first: tersor convert MODEL --to dense -o DENSE"
        )
    selection = select(checkpoint, include, exclude)
    plan = Plan(choose_format(checkpoint, format), dense_modules=list(selection.dense_modules))
    encoding = encodings.encoding(plan.format)
    plan.kept = {name: selection.reasons.get(name, "fewer than two dimensions") for name in checkpoint.tensors}
    for linear in selection.linears.values():
        settings = policy_for(policy or [], linear.name)
        if settings.get("keep"):
            _keep(plan, linear, "kept dense by the policy")
            continue
        wanted = _scheme_of(scheme, settings, linear.name)
        fitted, fallback = fit_group(wanted, linear.shape[1])
        if fallback and strict:
            raise TersorError(
                f"{linear.name}: {fallback}", "choose a --group-size that divides it, or leave --strict out"
            )
        try:
            encoding.check(linear.module, linear.shape, fitted)
        except TersorError as error:
            if strict:
                raise
            _keep(plan, linear, f"kept dense: {error}")
            continue
        scale_dtype = "F16" if plan.format == "gptq" else SCALE_DTYPES["compressed-tensors"][linear.dtype]
        layout = encoding.layout(linear.module, linear.shape, fitted, scale_dtype)
        plan.steps[linear.name] = Step(linear, fitted, scale_dtype, layout, fallback or "linear layer in a block")
        del plan.kept[linear.name]
    if not plan.steps:
        raise TersorError(
            f"{checkpoint.path}: no tensor is left to quantize", "see tersor quantize --dry-run for the reasons"
        )
    for name, info in checkpoint.tensors.items():
        plan.layout |= plan.steps[name].layout if name in plan.steps else {name: (info.dtype, info.shape)}
    _warn(plan)
    return plan


def _keep(plan: Plan, linear: Linear, reason: str) -> None:
    plan.kept[linear.name] = reason
    plan.dense_modules.append(linear.module)


def _scheme_of(default: Scheme, settings: dict, name: str) -> Scheme:
    unknown = settings.keys() - {"scheme", "group_size", "symmetric", "keep"}
    if unknown:
        raise TersorError(
            f"policy for {name}: unknown keys {sorted(unknown)}", "known: scheme group_size symmetric keep"
        )
    if not settings:
        return default
    if "scheme" in settings:
        return scheme_from_name(settings["scheme"], settings.get("group_size"), settings.get("symmetric", True))
    current = next(key for key, value in _names().items() if (value.bits, value.kind) == (default.bits, default.kind))
    return scheme_from_name(
        current, settings.get("group_size", default.group_size), settings.get("symmetric", default.symmetric)
    )


def _names() -> dict[str, Scheme]:
    from tersor.ops.quantize.schemes import SCHEMES

    return SCHEMES


def _warn(plan: Plan) -> None:
    sizes = {step.scheme.group_size for step in plan.steps.values() if step.scheme.strategy == "group"}
    odd = sorted(sizes - set(VLLM_GROUPS))
    if odd:
        plan.warnings.append(
            f"groups of {', '.join(map(str, odd))}: vLLM's Marlin kernels take {VLLM_GROUPS} only; "
            "a --group-size that divides every width serves faster"
        )
    if any(step.scheme.bits in (2, 3) and step.scheme.kind == "int" for step in plan.steps.values()):
        plan.warnings.append("2 and 3 bit weights lose quality fast: compare with tersor evaluate --compare before use")
    if plan.format == "compressed-tensors" and any(not step.scheme.symmetric for step in plan.steps.values()):
        plan.warnings.append("transformers 5.23 cannot reload asymmetric compressed-tensors weights; 5.17 and vLLM can")
