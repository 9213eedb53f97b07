"""Tiny models, each built once a session, and a text."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
from tiny_models import build


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family(name, **config changes) -> folder of a tiny model, built once."""
    built: dict[tuple, Path] = {}

    def get(name: str, dtype: str = "bfloat16", **changes) -> Path:
        key = (name, dtype, *sorted(changes.items()))
        if key not in built:
            built[key] = build(name, tmp_path_factory.mktemp("models") / name, dtype, **changes)
        return built[key]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A calibration text of about 30,000 bytes."""
    from tersor.ops.model.text import default_text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(default_text()[:30_000], "utf-8")
    return path
