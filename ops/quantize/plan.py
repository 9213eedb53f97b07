"""What happens to each tensor and why, decided from headers alone: --dry-run prints it, the run executes it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from tersor.formats import encodings, low_rank
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.header import tensor_bytes
from tersor.formats.scheme import Scheme
from tersor.formats.writer import Layout
from tersor.ops.model.schemes import SCHEMES, fit_group, scheme_from_name
from tersor.ops.model.selection import Linear, check_policy, policy_for, select

SCALE_DTYPES = {"compressed-tensors": {"F16": "F16", "BF16": "BF16", "F32": "F32", "F64": "F32"}}
VLLM_GROUPS = (32, 64, 128)
POLICY_TYPES = {"scheme": str, "group_size": int, "symmetric": bool, "keep": bool}
OF_PRUNE = "sparsity"  # one policy can serve both commands
EXPERT = re.compile(r"\.experts\.\d+\.")


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
    """`auto` is compressed-tensors, except for Conv1D families, which only the GPTQ loaders know.

    Raises TersorError for compressed-tensors of such a family: loaders would leave its layers at random values.
    """
    from tersor.formats.conv1d import CONV1D_FAMILIES

    family = (checkpoint.config or {}).get("model_type")
    if family in CONV1D_FAMILIES and requested == "compressed-tensors":
        raise TersorError(
            f"{checkpoint.path}: the Conv1D layers of {family} are no Linear, and compressed-tensors loaders pass them by",
            "use --format gptq",
        )
    if requested == "auto":
        return "gptq" if family in CONV1D_FAMILIES else "compressed-tensors"
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
    """Raises TersorError when the input is quantized already, nothing is selected, or `strict` forbids a fallback.

    `policy` is what `load_policy` returns; a pattern in it that matches no tensor is an error.
    """
    if encodings.detect(checkpoint.config, checkpoint.tensors) is not None:
        raise TersorError(
            f"{checkpoint.path}: is quantized already", "make it dense first: tersor convert MODEL --to dense -o DENSE"
        )
    low_rank.refuse(checkpoint, "they would be passed by, or rounded without regard to their product")
    selection = select(checkpoint, include, exclude)
    conv1d = next((linear.name for linear in selection.linears.values() if linear.transposed), None)
    if checkpoint.config is None and conv1d is not None:
        raise TersorError(
            f"{conv1d}: is stored as [in, out], which only a config.json can tell whoever reads the codes",
            "give the whole checkpoint folder",
        )
    plan = Plan(choose_format(checkpoint, format), dense_modules=[*selection.dense_modules, *selection.tables])
    encoding = encodings.encoding(plan.format)
    plan.kept = {name: selection.why_kept(name) for name in checkpoint.tensors}
    plan.warnings += check_policy(policy or [], checkpoint, selection)
    # A model's experts run as one fused kernel, and loaders read all of them by one scheme.
    expert_widths = frozenset(linear.shape[1] for linear in selection.linears.values() if EXPERT.search(linear.name))
    for linear in selection.linears.values():
        settings = {key: value for key, value in policy_for(policy or [], linear.name).items() if key != OF_PRUNE}
        wanted = _scheme_of(scheme, settings, linear.name)
        if settings.get("keep"):
            _keep(plan, linear, "kept dense by the policy")
            continue
        peers = expert_widths if EXPERT.search(linear.name) else frozenset()
        fitted, fallback = fit_group(wanted, linear.shape[1], peers)
        if plan.format == "gptq" and not fitted.symmetric:
            fitted = replace(fitted, least_zero_point=1)
        if fallback and strict:
            fits = (
                "--scheme fp8 takes any width"
                if wanted.strategy == "block"
                else "choose a --group-size that divides it"
            )
            raise TersorError(f"{linear.name}: {fallback}", f"{fits}, or leave --strict out")
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
        names = sorted([*selection.linears, *selection.reasons], key=lambda name: not re.search(r"\.\d+\.", name))
        example = f"{names[0]} is kept ({plan.kept[names[0]]})" if names else "it has none of two dimensions"
        raise TersorError(
            f"{checkpoint.path}: no tensor is left to quantize: {example}", "check --include, --exclude and --policy"
        )
    for name, info in checkpoint.tensors.items():
        plan.layout |= plan.steps[name].layout if name in plan.steps else {name: (info.dtype, info.shape)}
    _warn(plan, (checkpoint.config or {}).get("model_type"))
    return plan


def _keep(plan: Plan, linear: Linear, reason: str) -> None:
    plan.kept[linear.name] = reason
    plan.dense_modules.append(linear.module)


def _scheme_of(default: Scheme, settings: dict, name: str) -> Scheme:
    unknown = settings.keys() - POLICY_TYPES.keys()
    if unknown:
        raise TersorError(f"policy for {name}: unknown keys {sorted(unknown)}", f"known: {' '.join(POLICY_TYPES)}")
    for key, value in settings.items():
        if type(value) is not POLICY_TYPES[key]:
            raise TersorError(f"policy for {name}: {key} is {value!r}", f"it should be {POLICY_TYPES[key].__name__}")
    scheme = settings.get("scheme")
    if scheme is not None:
        return scheme_from_name(scheme, settings.get("group_size"), settings.get("symmetric", True))
    if not settings:
        return default
    scheme = next(key for key, value in SCHEMES.items() if _family(value) == _family(default))
    whole_rows = default.strategy == "channel" and SCHEMES[scheme].strategy == "group"
    size = settings.get("group_size", -1 if whole_rows else default.group_size)
    return scheme_from_name(scheme, size, settings.get("symmetric", default.symmetric))


def _family(scheme: Scheme) -> tuple:
    """What `--scheme` alone decides."""
    return scheme.bits, scheme.kind, scheme.activations


def _warn(plan: Plan, family: str | None) -> None:
    sizes = {step.scheme.group_size for step in plan.steps.values() if step.scheme.strategy == "group"}
    odd = sorted(sizes - set(VLLM_GROUPS))
    if odd:
        plan.warnings.append(
            f"groups of {', '.join(map(str, odd))}: vLLM's Marlin kernels take {VLLM_GROUPS} only; "
            "a --group-size that divides every width serves faster"
        )
    if any(step.scheme.bits in (2, 3) and step.scheme.kind == "int" for step in plan.steps.values()):
        plan.warnings.append("2 and 3 bit weights lose quality fast: compare with tersor evaluate --compare before use")
    if plan.format == "gptq":
        if any(not step.scheme.symmetric for step in plan.steps.values()):
            plan.warnings.append(
                "GPTQModel takes asymmetric gptq files from its own writer only; vLLM and AutoGPTQ take them as they are"
            )
        return
    schemes = [step.scheme for step in plan.steps.values()]
    whole = "load it with quantization_config=CompressedTensorsConfig(dequantize=True)"
    if any(not scheme.symmetric for scheme in schemes):
        plan.warnings.append(
            f"transformers 5.23 cannot reload asymmetric compressed-tensors weights as they are (5.17 and vLLM can): {whole}"
        )
    if family == "falcon":
        plan.warnings.append(f"transformers 5.23 cannot load quantized Falcon layers as they are: {whole}")
    experts = {step.scheme for name, step in plan.steps.items() if EXPERT.search(name)}
    if any(scheme.activations in ("int8", "fp8-group") for scheme in experts):
        plan.warnings.append(
            "transformers 5.23 cannot load w8a8 and fp8-block experts (vLLM can); --scheme fp8 or w8a16 loads in both"
        )
