"""Forward-only methods by the name that the command line gives them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tersor.formats.errors import TersorError
from tersor.ops.distill.forward_only.mezo import Mezo
from tersor.ops.distill.forward_only.qzo import Qzo
from tersor.ops.distill.forward_only.sparse_mezo import SparseMezo
from torch import nn

METHODS = {cls.method: cls for cls in (Mezo, SparseMezo, Qzo)}

# MeZO: the larger of the two rates of its authors for all weights of a large model (1e-6, 1e-7). Sparse MeZO moves a
# quarter of the weights and bears a rate a few times larger. QZO: that of its authors' script.
LEARNING_RATES = {"mezo": 1e-6, "sparse-mezo": 3e-6, "qzo": 1e-5}


def build_forward_only(
    name: str, parameters: Mapping[str, nn.Parameter], seed: int = 0, keep_zeros: Collection[str] = ()
) -> Mezo:
    """The method `name` (a key of METHODS) over `parameters`; for qzo these are scales alone.

    `keep_zeros` names parameters whose exact zeros stay. Raises TersorError for another name or nothing to train."""
    if name not in METHODS:
        raise TersorError(f"forward-only method {name!r} is unknown", f"one of {', '.join(METHODS)}")
    if not parameters:
        hint = (
            "qzo trains the scales of a quantized student"
            if name == "qzo"
            else "loosen --train, --include and --exclude"
        )
        raise TersorError("there is nothing to train", hint)
    return METHODS[name](parameters, seed, keep_zeros=keep_zeros)
