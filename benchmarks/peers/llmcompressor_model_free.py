"""Data-free quantization with llm-compressor's model_free_ptq. Runs in the peer's own environment.

python llmcompressor_model_free.py MODEL OUT WORKERS OBSERVER

OBSERVER is how a group's range is found: memoryless_minmax, the preset's own, or memoryless_mse, a search.
"""

import sys

from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import model_free_ptq

model_path, out, workers, observer = sys.argv[1:]
scheme = preset_name_to_scheme("W4A16", [])
scheme.weights.observer = observer
model_free_ptq(
    model_path, out, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens"], max_workers=int(workers), device="cpu"
)
