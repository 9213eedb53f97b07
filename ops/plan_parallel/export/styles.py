"""The tensor- and expert-parallel plan of a family in transformers' words: module pattern -> style.

Read from the source of transformers' configuration class (`base_model_tp_plan`, `base_model_ep_plan`), which is parsed, not
imported: planning needs no torch. Where the class has none, the feed-forward layers are found by their names; attention then
stays whole, for code that was not written to be cut may take fewer heads for a shorter sequence, as OPT's does.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tersor.ops.plan_parallel.model import FRONT, PlanModel

COLUMN = re.compile(r"(gate_proj|up_proj|fc1|fc_in|dense_h_to_4h)$")
ROW = re.compile(r"(down_proj|fc2|fc_out|dense_4h_to_h)$")
EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
EXPERT_RULES = {
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}


class Styles(NamedTuple):
    """Patterns are full names of modules and parameters, a number written `*`. `source` says where they are from."""

    tensor: dict[str, str]
    expert: dict[str, str]
    source: str


def styles(model: PlanModel, etp: int = 1) -> Styles:
    """Without rules for experts where `etp` is 1: then ranks of tensor parallelism hold whole experts.

    Embedding and head are cut over the vocabulary; logits are gathered.
    """
    facts = model.facts
    blocks = facts.block_prefix.rpartition(".")[2]
    prefix = facts.block_prefix[: len(facts.block_prefix) - len(blocks)]
    tensor, expert = family_plans(facts.family)
    source = f"transformers' configuration of {facts.family}"
    if not tensor:
        tensor, source = _by_name(model, blocks), "names of feed-forward modules, attention stays whole"
    if facts.experts and etp > 1 and not any(EXPERTS.search(name) for name in tensor):
        tensor |= {name.replace("layers", blocks, 1): style for name, style in EXPERT_RULES.items()}
    if etp == 1:
        tensor = {name: style for name, style in tensor.items() if not EXPERTS.search(name)}
    found = {prefix + name: style for name, style in tensor.items()}
    for name in model.pieces[0].weights:
        if model.kinds[name] == FRONT and model.stored[name].shape[:1] == (facts.vocab,):
            found[name.removesuffix(".weight")] = "embedding_rowwise"
    if facts.head:
        found[facts.head] = "colwise_gather_output"
    return Styles(found, {prefix + name: style for name, style in expert.items()}, source)


def _by_name(model: PlanModel, blocks: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for weight in model.stored.values():
        if weight.place is None or weight.place.blocks != model.facts.block_prefix or len(weight.shape) != 2:
            continue
        module = weight.place.rest.removesuffix(".weight")
        style = "colwise" if COLUMN.search(module) else "rowwise" if ROW.search(module) else None
        if style and not weight.place.numbered:
            found[f"{blocks}.*.{module}"] = style
    return found


@lru_cache
def family_plans(family: str) -> tuple[dict[str, str], dict[str, str]]:
    """(tensor, expert) of the class whose `model_type` is `family`, relative to the base model; empty where it has none."""
    tree = _configuration(family)
    if tree is None:
        return {}, {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and _assigned(node, "model_type") == family:
            return _assigned(node, "base_model_tp_plan") or {}, _assigned(node, "base_model_ep_plan") or {}
    return {}, {}


def _configuration(family: str) -> ast.Module | None:
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations or not re.fullmatch(r"\w+", family):
        return None
    models = Path(spec.submodule_search_locations[0]) / "models"
    for name in (family, family.removesuffix("_text")):
        path = models / name / f"configuration_{name}.py"
        if path.is_file():
            return ast.parse(path.read_text("utf-8"))
    return None


def _assigned(node: ast.ClassDef, name: str) -> object:
    """The literal that a class gives `name`, None where it gives none."""
    for item in node.body:
        targets = (
            item.targets if isinstance(item, ast.Assign) else [item.target] if isinstance(item, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets) and item.value is not None:
            try:
                return ast.literal_eval(item.value)
            except ValueError:
                return None
    return None


def why_not(model: PlanModel, tp: int, found: Styles) -> str:
    """What keeps these styles from cutting the model tp ways; empty where nothing does."""
    if tp == 1:
        return ""
    cut = [name for name, style in found.tensor.items() if "*" in name and style.startswith(("colwise", "rowwise"))]
    if not cut:
        return f"tp={tp}: no module of {model.facts.family} is known to be cut by columns or rows"
    for name in cut:
        if re.search(r"(k_proj|v_proj)$", name) and found.tensor[name] == "colwise":
            heads = min(attention.kv_heads for attention in model.facts.attends)
            if heads % tp:
                return f"tp={tp} does not divide {heads} heads of keys and values, and DTensor does not repeat them"
    return ""
