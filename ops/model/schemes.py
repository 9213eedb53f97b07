"""The scheme names of the command line, and which group size fits a width."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from tersor.formats.errors import TersorError
from tersor.formats.scheme import Scheme

SCHEMES = {
    "w4a16": Scheme(4),
    "w8a16": Scheme(8),
    "w3a16": Scheme(3),
    "w2a16": Scheme(2),
    "w8a8": Scheme(8, strategy="channel", activations="int8"),
    "fp8": Scheme(8, kind="float", strategy="channel", activations="fp8"),
    "fp8-block": Scheme(8, kind="float", strategy="block", block=(128, 128), activations="fp8-group"),
}
DEFAULT_GROUP_SIZE = 128
# Serving kernels step through the inputs 32 at a time; a group that is no multiple of it is only taken if nothing else fits.
KERNEL_STEP = 32
SMALLEST_GROUP = 16


def scheme_from_name(name: str, group_size: int | None = None, symmetric: bool = True) -> Scheme:
    """`group_size` -1 is one scale per row. Raises TersorError for what the scheme cannot have."""
    if name not in SCHEMES:
        raise TersorError(f"unknown scheme {name!r}", f"one of {' '.join(SCHEMES)}")
    scheme = SCHEMES[name]
    if scheme.strategy != "group":
        if group_size is not None:
            raise TersorError(
                f"{name} has no groups, --group-size {group_size} does not apply", "leave --group-size out"
            )
        if not symmetric:
            raise TersorError(f"{name} is symmetric only", "leave --asymmetric out")
        return scheme
    size = DEFAULT_GROUP_SIZE if group_size is None else group_size
    if size == -1:
        return replace(scheme, symmetric=symmetric, strategy="channel", group_size=None)
    if size < SMALLEST_GROUP or size % 8:
        raise TersorError(f"--group-size {size}", f"a multiple of 8, at least {SMALLEST_GROUP}, or -1 for whole rows")
    return replace(scheme, symmetric=symmetric, group_size=size)


def fit_group(scheme: Scheme, columns: int, peers: frozenset[int] = frozenset()) -> tuple[Scheme, str | None]:
    """The scheme for a row of `columns` weights: with the largest group that divides it, and why it differs.

    Groups of a multiple of 32 are preferred (576 gets 96 when 128 was asked for), then multiples of 8, then any divisor
    of at least 16; a width with none of them gets one scale per row. The inputs of a block-wise layer are quantized in
    runs as wide as a block, so a width that these do not divide gets one scale per row too. `peers` are the widths of
    layers that must get the same groups.
    """
    asked = scheme.block[1] if scheme.strategy == "block" else scheme.group_size
    if asked is None or all(width % asked == 0 for width in (columns, *peers)):
        return scheme, None
    odd = columns if columns % asked else min(width for width in peers if width % asked)
    reason = f"{odd} columns are not divisible by {asked}" + (
        "" if odd == columns else ", and experts share a group size"
    )
    if scheme.strategy == "block":
        chosen = replace(scheme, strategy="channel", block=None, activations="fp8")
        return chosen, f"{reason}: one scale per row"
    common = gcd(columns, *peers)
    divisors = [size for size in range(min(asked, common), SMALLEST_GROUP - 1, -1) if common % size == 0]
    for step in (KERNEL_STEP, 8, 1):
        if fitting := [size for size in divisors if size % step == 0]:
            return replace(scheme, group_size=fitting[0]), f"{reason}: groups of {fitting[0]}"
    chosen = replace(scheme, strategy="channel", group_size=None)
    return chosen, f"{reason} nor by anything from {SMALLEST_GROUP} on: one scale per row"
