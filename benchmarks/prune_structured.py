"""Cut a quarter of the layers or of the feed-forward neurons out: do file, parameters and time fall in proportion?

    python benchmarks/prune_structured.py --model cache/smollm2

Tokens per second are those of transformers on this CPU, float32, prefill of one window of 512 tokens; dense and cut models
take turns, and the median of the rounds counts. What should fall in proportion is the part of the model that is cut: the
table says how much of it the embeddings and the head make up, which stay.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from measure import HELDOUT, WINDOW, perplexity, save, tersor, use_cores

ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    threads = use_cores(arguments.threads)

    from tersor.formats.report import Report

    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
        models = {"dense": arguments.model}
        reports = {}
        for target in ("layers", "neurons"):
            models[target] = Path(folder) / target
            command = tersor(
                "prune", arguments.model, "-o", models[target], "--remove", target, "--sparsity", arguments.sparsity,
                "--samples", arguments.samples, "--seq-len", WINDOW, "-q",
            )  # fmt: skip
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            reports[target] = Report.load(models[target])
        speed = tokens_per_second(models)
        rows = {}
        for name, path in models.items():
            totals = reports[name].totals() if name in reports else None
            rows[name] = {
                "file_bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
                "params": totals["params_after"] if totals else reports["layers"].totals()["params_before"],
                "tokens_per_second": round(speed[name], 1),
                "seconds": reports[name].seconds if name in reports else None,
                "perplexity": perplexity(path)["perplexity"],
            }
    dense = rows["dense"]
    print(
        f"{'':10s}{'file MB':>10s}{'params M':>10s}{'tokens/s':>10s}{'time':>8s}{'perplexity':>12s}   of dense: file, params, time"
    )
    for name, row in rows.items():
        shares = [row["file_bytes"] / dense["file_bytes"], row["params"] / dense["params"]]
        shares.append(dense["tokens_per_second"] / row["tokens_per_second"])
        row["of_dense"] = dict(zip(("file", "params", "time"), (round(share, 3) for share in shares), strict=True))
        print(
            f"{name:10s}{row['file_bytes'] / 1e6:10.1f}{row['params'] / 1e6:10.1f}{row['tokens_per_second']:10.0f}"
            f"{row['seconds'] or 0:8.1f}{row['perplexity']:12.2f}   " + ", ".join(f"{share:.3f}" for share in shares)
        )
    path = save(
        "prune_structured",
        {
            "model": arguments.model.name,
            "sparsity": arguments.sparsity,
            "calibration": f"{arguments.samples} x {WINDOW} tokens",
            "text": HELDOUT.name,
            "threads": threads,
            "rows": rows,
        },
    )
    print(f"written to {path}")


def tokens_per_second(models: dict[str, Path]) -> dict[str, float]:
    """Prefill speed of each model, measured in turns."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for name, path in models.items()
    }
    ids = torch.arange(WINDOW)[None] + 100
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    with torch.no_grad():
        for round_ in range(ROUNDS + 1):
            for name, model in loaded.items():
                began = time.perf_counter()
                model(input_ids=ids, logits_to_keep=1)
                if round_:  # the first warms up
                    seconds[name].append(time.perf_counter() - began)
    return {name: WINDOW / statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
