"""GPTQ, SparseGPT or Wanda with llm-compressor on given token windows. Runs in the peer's own environment.

python llmcompressor_oneshot.py MODEL OUT WINDOWS.json DTYPE gptq GROUP_SIZE
python llmcompressor_oneshot.py MODEL OUT WINDOWS.json DTYPE sparsegpt|wanda SPARSITY
"""

import json
import sys

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

model_path, out, windows_path, dtype, method, amount = sys.argv[1:]
with open(windows_path) as stream:
    windows = json.load(stream)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
if method == "gptq":
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(amount)}
    recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
else:
    modifier = SparseGPTModifier if method == "sparsegpt" else WandaPruningModifier
    recipe = modifier(sparsity=float(amount), targets=["Linear"], ignore=["re:.*lm_head"])
oneshot(
    model=model,
    dataset=dataset,
    recipe=recipe,
    max_seq_length=len(windows[0]),
    num_calibration_samples=len(windows),
    shuffle_calibration_samples=False,
    pipeline="sequential",
)
model.save_pretrained(out, save_compressed=method == "gptq")
AutoTokenizer.from_pretrained(model_path).save_pretrained(out)
