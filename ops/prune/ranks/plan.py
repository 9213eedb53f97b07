"""Which weights become factors, and of what rank: decided from headers alone."""

from __future__ import annotations

import re
from fractions import Fraction
from math import floor, prod

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.low_rank import COUNT_KEY, Factors
from tersor.ops.model.selection import Linear, Selection, check_policy, load_policy, policy_for, select
from tersor.ops.prune.plan import Action, Plan, keep, share_of
from tersor.ops.prune.request import Request

HOW_TO_LOAD = (
    "from_pretrained does not know factors: load the output with tersor.ops.model.load, "
    "or fold them back with tersor convert --to dense"
)


def plan(checkpoint: Checkpoint, request: Request) -> Plan:
    """`details` are the Factors by dense tensor name. Raises TersorError when nothing is left to factorise."""
    _check(checkpoint, request)
    selection = select(checkpoint, request.include, request.exclude)
    policy = load_policy(request.policy)
    result = Plan(details={})
    for name, info in checkpoint.tensors.items():
        linear = selection.linears.get(name)
        if linear is None:
            result.actions[name] = keep(checkpoint, name, selection.why_kept(name))
            continue
        factors, reason = _factorise(checkpoint, linear, request, policy_for(policy, name))
        if factors is None:
            result.actions[name] = keep(checkpoint, name, reason)
            continue
        result.details[name] = factors
        if request.merge:
            result.actions[name] = Action("factorise", f"{reason}, folded back", {name: (info.dtype, info.shape)})
        else:
            result.actions[name] = Action("factorise", reason, dict(factors.layout), info.shape)
    result.warnings += check_policy(policy, checkpoint, selection)
    if not result.details and request.sparsity > 0:
        raise _nothing_left(checkpoint, selection, result)
    if request.sparsity == 0 and not result.details:
        result.warnings.append("--sparsity 0 removes nothing: every tensor is copied")
    elif request.merge:
        result.warnings.append("--merge stores the products in full size: the checkpoint is no smaller and no faster")
    else:
        result.warnings.append(HOW_TO_LOAD)
    return result


def budgeted(share: float, numbers: int, cost: int) -> int:
    """How many terms of `cost` numbers fit into what is left of `numbers` when `share` of them is removed.

    With the decimal number that was typed: 1 - 0.9 is less than 0.1 in binary, and a rank would be lost.
    """
    return floor((1 - Fraction(str(share))) * numbers / cost)


def grid_of(shape: tuple[int, int]) -> tuple[int, int]:
    """(m1, n1), the shape of B in W ~ sum B (x) C, for a weight `[out, in]`: m1 divides out and n1 divides in.

    The rearranged matrix [m1 n1, m2 n2] is as near to square as the divisors allow, where a term costs least (between
    2 sqrt(out in) and out in + 1 numbers); of several such choices the one whose B is nearest to square itself.
    """
    out, inputs = shape

    def cost(grid: tuple[int, int]) -> tuple:
        rows, columns = grid
        first = rows * columns
        second = out * inputs // first
        return first + second, Fraction(max(rows, columns), min(rows, columns)), rows, columns

    return min(((rows, columns) for rows in _divisors(out) for columns in _divisors(inputs)), key=cost)


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _check(checkpoint: Checkpoint, request: Request) -> None:
    """Settings of other targets that would be passed by in silence."""
    for option, value, default, way_out in (
        ("--allocate", request.allocate, "uniform", "give other shares to some layers with --policy"),
        ("--rounds", request.rounds, 1, "the nearest matrix of a rank is found at once"),
        ("--keep-shape", request.keep_shape, False, "--merge stores the products in the shape of the input"),
    ):
        if value != default:
            raise TersorError(f"{option} {value}: --remove ranks does not do that", way_out)
    if request.multiple_of < 1:
        raise TersorError(f"--multiple-of {request.multiple_of} is not a positive number", "8 suits most kernels")
    if request.method == "whitened":
        checkpoint.require_config("which --method whitened needs to run the model (--method svd needs none)")


def _factorise(checkpoint: Checkpoint, linear: Linear, request: Request, settings: dict) -> tuple[Factors | None, str]:
    """The factors of one weight, or None, and why."""
    if settings.get("keep"):
        return None, "kept dense by the policy"
    if linear.name.endswith("lm_head.weight") and (checkpoint.config or {}).get("tie_word_embeddings"):
        return None, "tied to the embeddings, which are no linear layer"
    share = share_of(settings, linear.name, request.sparsity)
    if share == 0:  # any more, and the factors are below the break-even by construction
        return None, "sparsity 0: past the break-even, factors are no smaller than the weight"
    (out, inputs), grid = linear.shape, None
    if request.method == "kronecker":
        grid = grid_of(linear.shape)
        first = prod(grid)
        cost, multiple, kind = first + out * inputs // first, 1, "kronecker"
    else:
        cost, multiple, kind = out + inputs, request.multiple_of, "low_rank"
    count = budgeted(share, out * inputs, cost) // multiple * multiple
    if count < 1:
        return (
            None,
            f"{COUNT_KEY[kind]} {multiple} takes {multiple * cost} numbers, the budget of sparsity {share} is less",
        )
    factors = Factors(linear.module, kind, count, linear.shape, linear.dtype, linear.transposed, grid)
    what = f"rank {count} of {min(linear.shape)}" if grid is None else f"{count} products with {grid[0]}x{grid[1]}"
    return factors, f"{what}, {1 - count * cost / (out * inputs):.1%} fewer parameters"


def _nothing_left(checkpoint: Checkpoint, selection: Selection, result: Plan) -> TersorError:
    names = [*selection.linears, *sorted(selection.reasons, key=lambda name: not re.search(r"\.\d+\.", name))]
    example = f"{names[0]} is kept ({result.actions[names[0]].reason})" if names else "it has none of two dimensions"
    return TersorError(
        f"{checkpoint.path}: no tensor is left to factorise: {example}",
        "check --sparsity, --include, --exclude, --multiple-of and --policy",
    )
