"""How transformers itself cuts a family's layers: `base_model_tp_plan` of its config classes.

The class bodies are read as text, because importing them imports torch; a family without such a table, or no transformers,
gives an empty plan.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)
MODEL_TYPE = re.compile(r"""^    model_type(?:: *str)? *= *["']([\w.-]+)["']""", re.MULTILINE)
PLAN = re.compile(r"^    base_model_tp_plan(?:: *[^=\n]+)? *= *(\{.*?^    \})", re.MULTILINE | re.DOTALL)


def models_folder() -> Path | None:
    """transformers' `models`, found without importing it."""
    found = find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "models"
    return folder if folder.is_dir() else None


@cache
def published_plan(model_type: str) -> dict[str, str]:
    """Module pattern, as `layers.*.self_attn.q_proj` -> colwise, rowwise, …; empty where transformers has none."""
    root = models_folder()
    if root is None or not re.fullmatch(r"[\w.-]+", model_type):
        return {}
    folder = model_type.replace("-", "_").replace(".", "_")
    while folder:
        for path in sorted((root / folder).glob("configuration_*.py")):
            plan = _of_class(path.read_text("utf-8"), model_type)
            if plan is not None:
                return plan
        folder = folder.rpartition("_")[0]  # qwen3_5_moe_text is in qwen3_5_moe
    return {}


def _of_class(text: str, model_type: str) -> dict[str, str] | None:
    """The plan in the body of the class of this type; None where no class is of this type."""
    starts = [found.start() for found in CLASS.finditer(text)] + [len(text)]
    for start, stop in pairwise(starts):
        body = text[start:stop]
        named = MODEL_TYPE.search(body)
        if named is None or named[1] != model_type:
            continue
        table = PLAN.search(body)
        if table is None:
            return {}
        try:
            plan = ast.literal_eval(table[1].strip())
        except (ValueError, SyntaxError):
            return {}
        return {key: value for key, value in plan.items() if isinstance(key, str) and isinstance(value, str)}
    return None
