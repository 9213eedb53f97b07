"""The constants of the cost model, by runtime. Those marked "fitted" come from benchmarks/plan_fit.py, which fits them on
half of torchtitan's published Llama 3.1 8B runs and shows them on the other half (benchmarks/results/plan_fit.json).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """How well a training runtime uses a device, and what it keeps.

    `product_efficiency` and `product_efficiency_fp8` are shares of the peak that large matrix products reach, 0 for what
    the hardware's description says; `attention_efficiency` that of fused attention forward, whose backward pass makes 2.5
    times the arithmetic (five products for two, Dao, "FlashAttention-2", 2023) at `attention_backward` of that speed.
    `elementwise_passes`: what norms, rotations, activations and residuals move, as a multiple of the bytes that a block
    keeps for its backward pass. `unbalanced_context` is how much of causal attention's triangle is left uneven between
    context-parallel ranks: 0 for halves that are paired (zigzag), 1 for plain slices, whose last rank waits for none.
    `overlap` is the share of computing time that traffic can hide behind. `logit_bytes` are held at the peak for each
    logit; `fragmentation` is the share of what comes and goes that the allocator loses; `fixed_bytes` workspaces and
    communicators. `flavour` says which tensors a block keeps (activations.py).
    """

    name: str
    flavour: str
    product_efficiency: float = 0.0
    product_efficiency_fp8: float = 0.0
    attention_efficiency: float = 0.35
    attention_backward: float = 0.8
    elementwise_passes: float = 2.0
    unbalanced_context: float = 0.0
    overlap: float = 0.9
    logit_bytes: float = 6.0
    fragmentation: float = 0.05
    fixed_bytes: float = 0.0


# Megatron-LM with Transformer Engine. Products reach what the hardware's description says, 0.7, which agrees with 68 % of an
# A100 that Galvatron measured on a Llama-2-7B layer; cuDNN's attention on H100 about half of the peak (Shah et al.,
# "FlashAttention-3", 2024). Logits in fp32 and their gradient in bf16, as vocab-parallel cross-entropy works in place.
MEGATRON = Runtime("megatron", "megatron", attention_efficiency=0.5)
# Hugging Face's modules under DDP or DeepSpeed: logits in bf16, as fp32, their log-softmax, and the gradient.
# FlashAttention-2 reaches 35 % of an H100 (Shah et al. 2024).
HUGGING_FACE = Runtime("hf", "hf", elementwise_passes=3.0, logit_bytes=14.0)
# Fitted, but for compiled passes (each kept tensor is written once and read once) and causal attention in plain slices.
TORCHTITAN = Runtime(
    "torchtitan compiled", "torchtitan-compiled", product_efficiency=0.4791, product_efficiency_fp8=0.3176,
    attention_efficiency=0.459, elementwise_passes=2.0, unbalanced_context=1.0, logit_bytes=11.8442, fragmentation=0.096,
)  # fmt: skip
TORCHTITAN_EAGER = Runtime(
    "torchtitan eager", "torchtitan", product_efficiency=0.4791, product_efficiency_fp8=0.3176,
    attention_efficiency=0.459, elementwise_passes=4.0132, unbalanced_context=1.0, logit_bytes=13.7226, fragmentation=0.096,
)  # fmt: skip

RUNTIMES = {"megatron": MEGATRON, "torchtitan": TORCHTITAN, "paper": MEGATRON, "deepspeed": HUGGING_FACE}
KERNEL_FLOOR_SECONDS = 7e-6  # of an operator started by PyTorch (autoparallel's floor for its roofline)
