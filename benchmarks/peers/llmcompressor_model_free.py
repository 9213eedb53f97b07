"""Data-free quantization with llm-compressor's model_free_ptq. Runs in the peer's own environment.

python llmcompressor_model_free.py MODEL OUT WORKERS
"""

import sys

from llmcompressor import model_free_ptq

model_path, out, workers = sys.argv[1:]
model_free_ptq(
    model_path, out, scheme="W4A16", ignore=["lm_head", "re:.*embed_tokens"], max_workers=int(workers), device="cpu"
)
