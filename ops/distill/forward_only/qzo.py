"""QZO: Shang et al., Fine-tuning Quantized Neural Networks with Zeroth-order Optimization (arXiv:2505.13430)."""

from __future__ import annotations

from tersor.ops.distill.forward_only.mezo import Mezo

CLIP = 100.0  # of the directional derivative
SMALLEST = 1e-7  # scale


class Qzo(Mezo):
    """MeZO on the group scales of a quantized model: codes and zero-points are never touched.

    `parameters` are the scales. The directional derivative is clipped to [-100, 100], and no scale falls below 1e-7.
    """

    method = "qzo"

    def limit(self, scalar: float) -> float:
        return max(-CLIP, min(CLIP, scalar))

    def apply(self, seed: int, scalar: float, lr: float) -> None:
        super().apply(seed, scalar, lr)
        if lr * scalar != 0:
            for parameter in self.parameters.values():
                parameter.detach().clamp_(min=SMALLEST)
