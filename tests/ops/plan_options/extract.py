"""Read the option names of the projects that plan-parallel exports to, out of their source, into JSON lists beside this file.

Names, how many values each takes and which words it allows: nothing else is copied, and nothing is imported or run. Once
per update of a project, from a checkout or an unpacked wheel:

    python extract.py megatron FOLDER --version "megatron-core 0.19.2" --date 2026-09-18 [--commit SHA]

`takes` of an option is `nothing` (a switch), `one`, `many`, or a list of the words it allows.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
Takes = str | list[str]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def words(node: ast.expr) -> list[str] | None:
    """The strings of a literal list or tuple, None where it is something else."""
    if isinstance(node, ast.List | ast.Tuple) and all(isinstance(item, ast.Constant) for item in node.elts):
        return [str(item.value) for item in node.elts]
    return None


def literals(annotation: ast.expr) -> list[str] | None:
    """The words of a `Literal[...]` anywhere in an annotation."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
            return words(node.slice) or [str(node.slice.value)] if hasattr(node.slice, "value") else words(node.slice)
    return None


def takes(annotation: ast.expr) -> Takes:
    text = ast.unparse(annotation)
    if text in ("bool", "bool | None", "Optional[bool]"):
        return "nothing"
    return literals(annotation) or ("many" if re.match(r"(Optional\[)?[Ll]ist\[", text) else "one")


def classes(root: Path, *folders: str) -> dict[str, ast.ClassDef]:
    found: dict[str, ast.ClassDef] = {}
    for folder in folders:
        place = root / folder
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            for node in ast.walk(parse(path)):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, node)
    return found


def fields(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> Iterator[ast.AnnAssign]:
    """Annotated fields of a dataclass, those of its bases first."""
    for base in node.bases:
        name = ast.unparse(base).rpartition(".")[2]
        if name in known and name != node.name:
            yield from fields(known[name], known)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item


def keyword(call: ast.expr | None, name: str) -> ast.expr | None:
    if not isinstance(call, ast.Call):
        return None
    return next((item.value for item in call.keywords if item.arg == name), None)


def added_arguments(tree: ast.AST) -> dict[str, Takes]:
    """Of `add_argument("--name", ...)` calls with literal settings."""
    found: dict[str, Takes] = {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "add_argument":
            action, choices = keyword(call, "action"), keyword(call, "choices")
            if isinstance(action, ast.Constant) and str(action.value).startswith("store_"):
                kind: Takes = "nothing"
            elif keyword(call, "nargs") is not None:
                kind = "many"
            else:
                kind = (words(choices) if choices is not None else None) or "one"
            for argument in call.args:
                if isinstance(argument, ast.Constant) and str(argument.value).startswith("--"):
                    found[argument.value] = kind
    return found


def megatron(root: Path) -> dict:
    """Arguments written out and those that ArgumentGroupFactory makes of the fields of dataclasses."""
    tree = parse(root / "megatron/training/arguments.py")
    options = added_arguments(tree)
    known = classes(root, "megatron/training", "megatron/core")
    lists = {
        target.id: words(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and words(node.value)
    }
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "ArgumentGroupFactory":
            exclude = keyword(call, "exclude")
            left_out = (
                lists.get(exclude.id) if isinstance(exclude, ast.Name) else words(exclude) if exclude else []
            ) or []
            for field in fields(known[call.args[0].id], known):
                init = keyword(field.value, "init")
                if field.target.id not in left_out and not (isinstance(init, ast.Constant) and init.value is False):
                    options |= _of_field(field)
    layout = parse(root / "megatron/core/transformer/pipeline_parallel_layer_layout.py")
    letters = [
        key.value
        for node in ast.walk(layout)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and len(str(key.value)) == 1
    ]
    return {"options": options, "pipeline layout letters": letters}


def _of_field(field: ast.AnnAssign) -> dict[str, Takes]:
    name, kind = field.target.id.replace("_", "-"), takes(field.annotation)
    metadata = keyword(field.value, "metadata")
    if isinstance(metadata, ast.Dict) and ast.unparse(metadata.keys[0]) == "'argparse_meta'":
        settings = metadata.values[0]
        pairs = {key.value: value for key, value in zip(settings.keys, settings.values, strict=True)}
        if "arg_names" in pairs:
            return {given: kind for given in words(pairs["arg_names"])}
    default = keyword(field.value, "default") if isinstance(field.value, ast.Call) else field.value
    if kind == "nothing" and isinstance(default, ast.Constant) and default.value is True:
        return {f"--no-{name}": kind, f"--disable-{name}": kind}
    return {f"--{name}": kind}


def torchtitan(root: Path) -> dict:
    """Fields of the configuration by section, the functions that make one, and policies of recomputation."""
    known = classes(root, "torchtitan/config/configs.py")
    sections = {"parallelism": "ParallelismConfig", "training": "TrainingConfig", "compile": "CompileConfig"}
    options = {
        f"{section}.{field.target.id}": takes(field.annotation)
        for section, name in sections.items()
        for field in fields(known[name], known)
    }
    backend = classes(root, "torchtitan/experiments/transformers_modeling_backend/configs.py")
    for field in fields(backend["TransformersBackendConfig"], {}):
        options[field.target.id] = takes(field.annotation)
    trainer = classes(root, "torchtitan/trainer.py")
    options |= {field.target.id: "one" for field in fields(trainer["Config"], {})}
    options |= {f"checkpoint.{field.target.id}": takes(field.annotation) for field in _checkpoint(root)}
    configs = {}
    for path in sorted(root.glob("torchtitan/*/*/config_registry.py")):
        names = [node.name for node in parse(path).body if isinstance(node, ast.FunctionDef)]
        configs[path.parent.name] = [name for name in names if not name.startswith("_")]
    policies = re.findall(
        r'subcommand\("([\w-]+)"\)', (root / "torchtitan/distributed/activation_checkpoint.py").read_text()
    )
    module = [name for name in classes(root, "torchtitan/distributed/activation_checkpoint.py") if name.endswith("AC")]
    return {"options": options, "configs": configs, "activation checkpoint": policies, "policies": module}


def _checkpoint(root: Path) -> Iterator[ast.AnnAssign]:
    for path in sorted((root / "torchtitan/components").rglob("*.py")):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("CheckpointManager"):
                for inner in node.body:
                    if isinstance(inner, ast.ClassDef) and inner.name == "Config":
                        yield from fields(inner, {})


def deepspeed(root: Path) -> dict:
    """Keys of the JSON configuration: by section for those that are pydantic models, all words of the constants otherwise."""
    runtime = root / "deepspeed/runtime"
    constants = []
    for path in ("constants.py", "zero/config.py", "activation_checkpointing/config.py", "precision_config.py"):
        if (runtime / path).exists():
            constants += [
                node.value.value
                for node in parse(runtime / path).body
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            ]
    sections = {
        "zero_optimization": ("zero/config.py", "DeepSpeedZeroConfig"),
        "zero_optimization.offload_param": ("zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
        "zero_optimization.offload_optimizer": ("zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
        "tensor_parallel": ("tensor_parallel/config.py", "TPTrainingConfig"),
    }
    options = {}
    for section, (path, name) in sections.items():
        for field in fields(classes(runtime, path)[name], {}):
            alias = keyword(field.value, "alias")
            options[f"{section}.{alias.value if alias else field.target.id}"] = takes(field.annotation)
    # parse_autoep_config reads `param_dict.get("name")`.
    parser = next(
        node
        for node in parse(root / "deepspeed/module_inject/auto_ep_config.py").body
        if isinstance(node, ast.FunctionDef) and node.name == "parse_autoep_config"
    )
    for call in ast.walk(parser):
        if (
            isinstance(call, ast.Call)
            and getattr(call.func, "attr", None) == "get"
            and isinstance(call.args[0], ast.Constant)
        ):
            options[f"expert_parallel.{call.args[0].value}"] = "one"
    keys = {word for word in constants if isinstance(word, str) and re.fullmatch(r"[a-z][a-z0-9_]*", word)}
    return {"options": options, "keys": sorted(keys)}


def vllm(root: Path) -> dict:
    known = classes(root, "vllm/config")
    kinds: dict[str, Takes] = {}
    for node in known.values():
        for field in fields(node, {}):
            kinds.setdefault(field.target.id, takes(field.annotation))
    options = {}
    for call in ast.walk(parse(root / "vllm/engine/arg_utils.py")):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "add_argument":
            source = next((item.value for item in call.keywords if item.arg is None), None)
            key = source.slice.value if isinstance(source, ast.Subscript) and hasattr(source.slice, "value") else None
            for argument in call.args:
                if isinstance(argument, ast.Constant) and str(argument.value).startswith("--"):
                    kind = kinds.get(key, "one")
                    options[argument.value] = kind if isinstance(kind, str) else "one"
    environment = sorted(set(re.findall(r'^    "(VLLM_\w+)":', (root / "vllm/envs.py").read_text(), re.MULTILINE)))
    return {"options": options, "environment": environment}


def transformers(root: Path) -> dict:
    """Styles of a tp_plan or ep_plan, and the fields of DistributedConfig."""
    folder = root / "transformers/distributed"
    styles = [
        call.args[0].value
        for path in ("tensor_parallel.py", "expert_parallel.py")
        for call in ast.walk(parse(folder / path))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "ALL_PARALLEL_STYLES.register"
    ]
    known = classes(folder, "configuration_utils.py")
    options = {field.target.id: takes(field.annotation) for field in fields(known["DistributedConfig"], {})}
    return {"options": options, "styles": sorted(styles)}


PROJECTS = {
    "megatron": megatron, "torchtitan": torchtitan, "deepspeed": deepspeed, "vllm": vllm, "transformers": transformers,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("project", choices=PROJECTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", required=True)
    parser.add_argument("--date", required=True)
    parser.add_argument("--commit")
    given = parser.parse_args()
    found = {"project": given.project, "version": given.version, "commit": given.commit, "date": given.date}
    found |= PROJECTS[given.project](given.folder)
    found["options"] = dict(sorted(found["options"].items()))
    (HERE / f"{given.project}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
