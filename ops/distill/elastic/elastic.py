"""Nested widths and depths of one model in training: the parts of this folder put together for a training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tersor.formats.dense import DenseView
from tersor.formats.elastic import FILE, SubNetwork, from_json
from tersor.ops.distill.elastic.order import Progress, SortedCheckpoint, sort_units
from tersor.ops.distill.elastic.sampling import Draw, Sampler
from tersor.ops.distill.elastic.space import Space
from tersor.ops.distill.elastic.subnetwork import Runner
from torch import nn


class Elastic:
    """An elastic run over the checkpoint of `view`.

    Build the student from `self.view`, whose units are sorted. In a step, for each `draw` of `sample()`, open
    `running(draw.network)` around its forward and backward pass; after the step, `record(losses)`. `self.state_dict()` is
    what --resume needs beside the parameters, and `document()` the elastic.json to be written with the checkpoint.
    """

    def __init__(
        self,
        view: DenseView,
        device: torch.device,
        windows: torch.Tensor | None = None,
        *,
        seed: int = 0,
        steps: int = 1,
        seq_len: int = 256,
        shares: Mapping[str, Sequence[float]] | None = None,
        per_block: bool = False,
        multiple_of: int = 1,
        state: dict | None = None,
        progress: Progress = lambda *_: None,
        **sampling,
    ):
        """`windows` `[windows, seq_len]` is the text by whose activations units are sorted; without it, by magnitude.
        `shares` may give those of `neurons`, `heads` and `depth`; heads that no config.json can say fewer of are then nested
        as well, and extract with --keep-shape. `sampling` is for `Sampler`. `state`: a `state_dict`.

        Raises TersorError for a model whose units cannot be sorted, or that has none.
        """
        nesting = None if state is None else from_json(state["order"], Path("the saved order"))
        self.order = sort_units(view, device, windows, nesting, progress, "heads" in (shares or {}))
        self.warnings = [f"not elastic: {reason}" for reason in self.order.reasons]
        self.space = Space(self.order, shares, per_block, multiple_of, seq_len)
        self.sampler = Sampler(self.space, seed, steps, **sampling)
        if state is not None:
            self.sampler.load_state_dict(state["sampler"])
        self.view = view if not self.order.fold.names else DenseView(SortedCheckpoint(view.checkpoint, self.order.fold))
        self._runner: Runner | None = None

    def bind(self, model: nn.Module) -> None:
        """The model that runs, built from `self.view`."""
        self._runner = Runner(model, self.order)

    def running(self, network: SubNetwork):
        """A context in which the bound model is `network`; it has to span the backward pass as well."""
        if self._runner is None:
            raise ValueError("no model is bound")
        return self._runner(network)

    def sample(self) -> list[Draw]:
        return self.sampler.sample()

    def record(self, losses: Sequence[float]) -> None:
        self.sampler.record(losses)

    def state_dict(self) -> dict:
        """For JSON."""
        nesting = self.order.nesting
        nesting.bank = []
        return {"order": nesting.to_json(), "sampler": self.sampler.state_dict()}

    def document(self) -> dict:
        """The content of elastic.json."""
        nesting = self.order.nesting
        nesting.networks, nesting.bank = self.sampler.best(), self.sampler.bank_entries()
        return nesting.to_json()

    def report(self) -> dict:
        """What the report says: sizes of the named sub-networks."""
        costs, best = self.space.costs, self.sampler.best()
        return {
            "file": FILE,
            "sorted_by": self.order.nesting.method,
            "space": {key: list(found) for key, found in self.space.options.items()},
            "networks": {
                name: {"parameters": costs.parameters(network), "flops_per_token": costs.flops(network), **network.to_json()}
                for name, network in best.items()
            },
        }  # fmt: skip
