"""Families whose linear layers are stored `[in, out]`: transformers' `Conv1D`, as in GPT-2."""

from __future__ import annotations

from tersor.formats.checkpoint import Checkpoint

CONV1D_FAMILIES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}


def is_transposed(checkpoint: Checkpoint, weight_name: str) -> bool:
    """Whether `weight_name` belongs to a Conv1D: the module has its name, and the model's family or a bias proves it.

    A bare file has no family; there the bias does: `c_attn.weight` is `[in, 3 in]` and its bias has `3 in` entries.
    """
    if weight_name.removesuffix(".weight").rsplit(".", 1)[-1] not in CONV1D_MODULES:
        return False
    if checkpoint.config is not None:
        return checkpoint.config.get("model_type") in CONV1D_FAMILIES
    return _bare_file_is_conv1d(checkpoint)


def _bare_file_is_conv1d(checkpoint: Checkpoint) -> bool:
    for name, info in checkpoint.tensors.items():
        bias = checkpoint.tensors.get(name.removesuffix(".weight") + ".bias")
        if (
            name.endswith("c_attn.weight")
            and len(info.shape) == 2
            and bias is not None
            and info.shape[0] != info.shape[1]
        ):
            return bias.shape == info.shape[1:]
    return False
