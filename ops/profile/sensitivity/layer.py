"""The numbers of one layer: what it holds, what comes in, and what every scheme makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.encodings import dequantize
from tersor.formats.header import TORCH_DTYPES
from tersor.ops.model.grid import round_to_nearest
from tersor.ops.model.selection import Linear
from tersor.ops.model.statistics import InputStatistics, output_energy, weight_error
from tersor.ops.profile.sensitivity import formats_sqnr
from tersor.ops.profile.sensitivity.candidates import PRUNED, Storage, candidates, masked
from tersor.ops.profile.sensitivity.compensation import gptq_share
from tersor.ops.profile.sensitivity.outliers import outlier_channels

SAMPLED_ROWS = 32  # of each weight, for the comparison of 8-bit formats


class LayerMeter:
    """Quantizes as `quantize --method rtn` would, to see what is lost."""

    def __init__(self, checkpoint: Checkpoint, linears: dict[str, Linear]):
        self.checkpoint, self.storage, self.candidates = checkpoint, Storage(checkpoint, linears), candidates()

    def weight_numbers(self, linear: Linear, weight: torch.Tensor) -> dict:
        """`weight` float32 `[out, in]`."""
        found = formats_sqnr.compare(weight, SAMPLED_ROWS)
        return {
            "shape": list(linear.shape),
            "bytes": self.checkpoint.tensors[linear.name].nbytes,
            "kurtosis": found["kurtosis"],
            "formats_sqnr_db": found["sqnr_db"],
            "format_choice": found["choice"],
        }

    def input_numbers(self, statistics: InputStatistics | None) -> dict:
        if statistics is None:
            return {"tokens": 0, "outliers": None, "gptq_share": 1.0}
        if "share" not in statistics.prepared:  # once for all layers with this input
            statistics.prepared["share"] = gptq_share(statistics.hessian)
        return {
            "tokens": statistics.tokens,
            "outliers": outlier_channels(statistics.column_norms),
            "gptq_share": statistics.prepared["share"],
        }

    def changed(
        self, linear: Linear, weight: torch.Tensor, statistics: InputStatistics | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Label and changed weight of every candidate that the layer can have."""
        for candidate in self.candidates:
            if candidate.pattern is not None:
                if candidate.pattern.misfit(linear.shape) is None:
                    share = PRUNED[candidate.label][1]
                    yield candidate.label, masked(weight, statistics, candidate.pattern, share)
                continue
            fitted = self.storage.fitted(linear, candidate.scheme)
            if fitted is not None:
                dtype = getattr(torch, TORCH_DTYPES[self.storage.scale_dtype(linear)])
                yield candidate.label, dequantize(round_to_nearest(weight, fitted[0], dtype), fitted[0])

    def schemes(
        self, linear: Linear, weight: torch.Tensor, statistics: InputStatistics | None = None
    ) -> dict[str, dict]:
        """By label: bytes and bits on disk, errors of the weight and, with statistics, of the layer's output."""
        nbytes = {
            candidate.label: fitted[1]
            for candidate in self.candidates
            if candidate.scheme is not None and (fitted := self.storage.fitted(linear, candidate.scheme))
        }
        settings = {candidate.label: candidate.settings for candidate in self.candidates}
        energy = output_energy(weight, statistics.hessian) if statistics is not None else 0.0
        rows = {}
        for label, changed in self.changed(linear, weight, statistics):
            row = {"settings": settings[label], **weight_error(weight, changed)}
            if label in nbytes:
                row |= {"bytes": nbytes[label], "bits": 8 * nbytes[label] / weight.numel()}
            if statistics is not None:
                lost = output_energy(weight - changed, statistics.hessian)
                row["output_relative_mse"] = lost / energy if energy > 0 else 0.0
            rows[label] = row
        return rows
