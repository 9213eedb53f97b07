"""Blocks of a model set up to run again and again at one prompt size, with a real cache.

Running one block over and over would time weights that sit in the processor's cache, which those of a whole model do not.
So several blocks of each kind get weights, as many as it takes to overflow that cache, and run one after another.
"""

from __future__ import annotations

import torch
from tersor.formats.errors import TersorError
from tersor.ops.model.bare import BareModel, Kind, free_bytes, run_block
from tersor.ops.model.timer import cache_bytes, seconds

CACHES = 2  # so many times the last cache is what the weights take


def choose_blocks(bare: BareModel, kinds: list[Kind]) -> dict[str, list[int]]:
    """Kind → its blocks that get weights. Raises TersorError where one of each does not fit into memory."""
    free = free_bytes(bare.device) - bare.shell_bytes
    chosen = {}
    for kind in kinds:
        wanted = 1 + CACHES * cache_bytes(bare.device) // max(kind.parameter_bytes, 1)
        fitting = free // 2 // len(kinds) // max(kind.parameter_bytes, 1)
        if fitting < 1:
            raise TersorError(
                f"a block of {kind.name} takes {kind.parameter_bytes} bytes, {max(free, 0)} are free beside embedding and head",
                "measure on a device with more memory",
            )
        chosen[kind.name] = kind.layers[: min(wanted, fitting, len(kind.layers))]
    return chosen


class Stand:
    """`batch` sequences of `tokens`: what the model calls its blocks with, and the cache before and after."""

    @torch.no_grad()
    def __init__(self, bare: BareModel, chosen: dict[str, list[int]], batch: int, tokens: int):
        """`tokens` plays no part for a model that reads images."""
        self.bare, self.chosen = bare, chosen
        inputs = bare.inputs(batch, tokens)
        self.ids = next(iter(inputs.values()))
        self.cache = bare.new_cache() if bare.causal else None
        self.calls, shape = bare.calls(inputs, self.cache)
        self.tokens = shape[1]
        self.hidden = torch.randn(shape, generator=torch.Generator().manual_seed(tokens)).to(bare.device, bare.dtype)
        self.empty = self._state()
        for blocks in chosen.values():
            self._chain(blocks, self.hidden, self.calls)
        self.full = self._state()
        if bare.causal:
            self.step_calls, _ = bare.calls({"input_ids": self.ids[:, :1]}, self.cache)

    @torch.no_grad()
    def prompt(self, kind: str, blocks: list[int] | None = None) -> float:
        """Seconds of one block that reads the prompt into an empty cache."""
        blocks = blocks or self.chosen[kind]
        self._restore(self.empty)
        return self._timed(blocks, self.hidden, self.calls)

    @torch.no_grad()
    def step(self, kind: str) -> float:
        """Seconds of one block that adds one token to each sequence."""
        self._restore(self.full)
        return self._timed(self.chosen[kind], self.hidden[:, :1], self.step_calls)

    @torch.no_grad()
    def prompt_shell(self) -> float:
        """Seconds of all that is not blocks: embedding, masks, last norm, head on the last position."""
        self._restore(self.empty)
        return self._shell(self.ids)

    @torch.no_grad()
    def step_shell(self) -> float:
        self._restore(self.full)
        return self._shell(self.ids[:, :1])

    def _shell(self, ids: torch.Tensor) -> float:
        inputs = {self.bare.model.base_model.main_input_name: ids, **forward_options(self.bare, self.cache)}
        with self.bare.without_blocks() as model:
            return seconds(lambda: model(**inputs), self.bare.device)

    def _timed(self, blocks: list[int], hidden: torch.Tensor, calls: list) -> float:
        return seconds(lambda: self._chain(blocks, hidden, calls), self.bare.device) / len(blocks)

    def _chain(self, blocks: list[int], hidden: torch.Tensor, calls: list) -> None:
        for index in blocks:
            hidden = run_block(self.bare.blocks[index], hidden, calls[index])

    def _state(self) -> list[dict]:
        """The layers of the cache as they are; a layer grows by new tensors, so that the old ones stay what they were."""
        return [] if self.cache is None else [dict(vars(layer)) for layer in self.cache.layers]

    def _restore(self, state: list[dict]) -> None:
        for layer, values in zip(self.cache.layers if self.cache is not None else (), state, strict=True):
            vars(layer).clear()
            vars(layer).update(values)


def forward_options(bare: BareModel, cache) -> dict:
    """As generation calls the model: with a cache, and logits for the last position only."""
    import inspect

    options = {} if cache is None else {"past_key_values": cache, "use_cache": True}
    if bare.causal and "logits_to_keep" in inspect.signature(type(bare.model).forward).parameters:
        options["logits_to_keep"] = 1
    return options
