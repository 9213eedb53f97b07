"""What a run would work on, from headers and without torch: the same for --dry-run and the run."""

from __future__ import annotations

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.locate import locate
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.sparsify.request import Request
from tersor.ops.sparsify.targets import Targets, find_targets


def plan(request: Request) -> tuple[Checkpoint, Targets]:
    """What would be worked on, from headers. Raises TersorError for anything that can be seen to fail."""
    if request.activations is not None and not 0 < request.activations < 1:
        raise TersorError(
            f"--activations {request.activations} is not between 0 and 1", "0.5 zeroes half of the inputs"
        )
    if request.stats is not None and request.pattern is None and request.policy is None:
        raise TersorError(
            "--stats weighs what --pattern removes, and there is none", "add --pattern, or leave --stats out"
        )
    checkpoint = open_checkpoint(locate(request.model))
    if request.activations is not None:
        checkpoint.require_config("which --activations needs to run the model")
    return checkpoint, find_targets(checkpoint, request)
