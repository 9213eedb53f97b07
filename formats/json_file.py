"""JSON objects from files that others may have written."""

from __future__ import annotations

import json
from pathlib import Path

from tersor.formats.errors import TersorError


def read_object(path: Path, way_out: str) -> dict:
    """Raises TersorError, with `way_out` as its hint, when the file is not readable or holds no JSON object."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TersorError(f"{path}: not readable as JSON ({error})", way_out) from error
    if not isinstance(content, dict):
        raise TersorError(f"{path}: not a JSON object", way_out)
    return content
