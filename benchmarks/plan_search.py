"""Seconds and memory to plan large models on large clusters, from the start of Python to the written report.

    python benchmarks/plan_search.py [--models Llama-3.1-405B]

Llama-3.1-405B on 1,024 H100 and DeepSeek-V3 on 2,048, and Llama-3.1-8B on 64 for scale; headers as published, their data a
hole in the file. The goal is a minute for the first on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measure import measure, save, tersor, use_cores

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import header_models as models

GOAL_MODEL, GOAL_SECONDS = "Llama-3.1-405B", 60.0
CASES = {
    "Llama-3.1-8B": (models.LLAMA_8B, models.llama_shapes, "8x8xh100", 512, 8192),
    "Llama-3.1-405B": (models.LLAMA_405B, models.llama_shapes, "128x8xh100", 2048, 8192),
    "DeepSeek-V3": (models.DEEPSEEK_V3, models.deepseek_shapes, "256x8xh100", 15360, 4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    chosen = parser.parse_args().models
    use_cores(2)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, shapes, cluster, batch, length) in ((name, CASES[name]) for name in chosen):
            model = models.write_model(Path(folder) / name, config, shapes(config), shard_bytes=5_000_000_000)
            out = Path(folder) / f"{name}-plan"
            command = tersor(
                "plan-parallel", model, "-o", out, "--cluster", cluster, "--global-batch", batch, "--seq-len", length, "-q"
            )  # fmt: skip
            took = measure(command)
            plan = json.loads((out / "plan.json").read_text())
            rows[name] = {
                "cluster": cluster,
                "global_batch": batch,
                "seq_len": length,
                "seconds": took.seconds,
                "peak_rss_bytes": took.peak_rss_bytes,
                "searched": plan["searched"],
                "layout": json.loads((out / "report.json").read_text())["quality"]["plan"]["layout"],
                "predicted_mfu": plan["predicted"]["mfu"],
            }
            found = rows[name]["searched"]
            print(
                f"{name:16s}{cluster:12s}{took.seconds:8.1f} s{took.peak_rss_bytes / 1e6:8.0f} MB{found['considered']:10,} layouts, "
                f"{found['estimated']:,} priced"
            )
    reached = rows[GOAL_MODEL]["seconds"] < GOAL_SECONDS if GOAL_MODEL in rows else None
    if reached is not None:
        print(f"goal of {GOAL_SECONDS:.0f} s for {GOAL_MODEL}: {'reached' if reached else 'missed'}")
    print(f"written to {save('plan_search', {'rows': rows, 'goal_seconds': GOAL_SECONDS, 'reached': reached})}")


if __name__ == "__main__":
    main()
