"""GPTQ with llm-compressor on given token windows. Runs in the peer's own environment.

python llmcompressor_gptq.py MODEL OUT WINDOWS.json GROUP_SIZE DTYPE
"""

import json
import sys

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

model_path, out, windows_path, group_size, dtype = sys.argv[1:]
with open(windows_path) as stream:
    windows = json.load(stream)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group_size)}
recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
oneshot(
    model=model,
    dataset=dataset,
    recipe=recipe,
    max_seq_length=len(windows[0]),
    num_calibration_samples=len(windows),
    shuffle_calibration_samples=False,
    pipeline="sequential",
)
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(model_path).save_pretrained(out)
