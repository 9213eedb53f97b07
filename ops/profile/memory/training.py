"""The allocations of training a checkpoint, from what autograd saves of one of its blocks."""

from __future__ import annotations

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.memory_trace import Trace
from tersor.ops.model.activations import saved_sizes, training_block
from tersor.ops.model.bare import BareModel
from tersor.ops.profile.memory.synthesize import synthetic_trace
from tersor.ops.profile.request import Workload

COUNTED_AT = (32, 64)  # tokens
BYTES = 2  # of a weight, a gradient and an activation: bfloat16
ADAM_BYTES = 12  # of a weight: two moments and a master copy in float32
LOGIT_BYTES = 4


def training_trace(checkpoint: Checkpoint, workload: Workload) -> Trace:
    """Two steps of mixed-precision AdamW on one device, a micro-batch of one sequence of `prompt` tokens for each of `batch`.

    The blocks are taken to be like the first one. Raises TersorError for a model that cannot be built or run without data.
    """
    bare = BareModel(checkpoint, torch.device("cpu"), torch.bfloat16)
    with training_block(bare, 0) as block:
        first, second = (saved_sizes(bare, block, 0, tokens) for tokens in COUNTED_AT)
        weights = [parameter.numel() for parameter in block.parameters()]
    bare.empty(0)
    few, more = COUNTED_AT
    saved = [
        small + (large - small) * (workload.prompt - few) // (more - few)
        for small, large in zip(first, second, strict=True)
    ]
    outside = [parameter.numel() for parameter in bare.shell]
    vocabulary = getattr(bare.text_config, "vocab_size", 0) if bare.causal else 0
    return synthetic_trace(
        [max(0, nbytes) for nbytes in saved],
        layers=len(bare.blocks),
        weights=[BYTES * count for count in weights],
        optimizer=[ADAM_BYTES * count for count in weights],
        rest=[BYTES * count for count in outside],
        rest_optimizer=[ADAM_BYTES * count for count in outside],
        head=[LOGIT_BYTES * workload.prompt * vocabulary] if vocabulary else [],
        micro_batches=workload.batch,
        name=f"{checkpoint.path.name}: AdamW, {workload.batch} x {workload.prompt} tokens",
    )
