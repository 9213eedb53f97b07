"""A teacher that is in memory whole, as `tersor.ops.model.load` makes it."""

from __future__ import annotations

from pathlib import Path

import torch
from tersor.formats.dense import DenseView
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.distill.losses.capture import Capture
from tersor.ops.distill.losses.heads import final_states, read_head
from tersor.ops.distill.losses.projections import projections_of_model
from tersor.ops.distill.teachers.targets import Targets, Wanted, probe_ids
from tersor.ops.model import load
from tersor.ops.model.runtime import bare_model, definition
from tersor.ops.model.skeleton import find_blocks
from torch import Tensor


class InProcess:
    """Runs each micro-batch through the model when it is asked."""

    mode = "in-process"

    def __init__(self, path: Path, wanted: Wanted, device: str = "auto"):
        """Raises TersorError for a folder that is damaged, or a model without what is wanted."""
        checkpoint = open_checkpoint(path)
        checkpoint.require_config("which says what model the teacher is")
        class_, config = definition(DenseView(checkpoint))
        # Found without weights: a block whose layers all run as they are stored has none of the usual kind.
        prefix, blocks = find_blocks(bare_model(class_, config, path))
        wanted.check(path, len(blocks))
        self.wanted, self.fingerprint = wanted, checkpoint.fingerprint()
        self.model = load(path, device).requires_grad_(False)
        self.model.config.use_cache = False
        self.blocks, self.hidden_size = len(blocks), self.model.config.get_text_config().hidden_size
        self.embeddings = len(self.model.get_input_embeddings().weight)
        listed = dict(enumerate(self.model.get_submodule(prefix)))
        projections = projections_of_model(self.model, {index: listed[index] for index in wanted.attention})
        self._capture = Capture(listed, wanted.blocks, projections)
        self.vocabulary, self.head = None, None
        if wanted.logits:
            self.head = read_head(self.model)
            self.vocabulary = self._count_logits()

    @torch.no_grad()
    def _count_logits(self) -> int:
        states = final_states(self.model, self.head, input_ids=probe_ids(self.model))
        return self.head.logits(states[0, :1]).shape[-1]

    @torch.no_grad()
    def targets(self, step: int, ids: Tensor) -> Targets:
        """`step` does not matter here."""
        ids = ids.to(self.model.get_input_embeddings().weight.device)
        hidden = None
        with self._capture as seen:
            if self.head is not None:
                hidden = final_states(self.model, self.head, input_ids=ids)
            else:
                self.model.base_model(input_ids=ids)
        return Targets(hidden=hidden, head=self.head, blocks=seen.outputs, attention=seen.attention)
