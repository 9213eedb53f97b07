"""Half of the weights become zero: SparseGPT and Wanda here and in llm-compressor, on the same token windows.

    python benchmarks/prune_vs_llmcompressor.py --peer-python .venv-peers/bin/python --model cache/smollm2

Both get the same 32 x 512 tokens of the shipped calibration text and the same cores and threads. llm-compressor runs with
its defaults, in the dtype that `--peer-dtype` loads the model in: `auto`, the checkpoint's own, or `float32`, which this
toolkit computes in and which is faster on most CPUs. All perplexities are measured by `tersor evaluate`. `--no-repair` is
each method as published; `--repair`, the default, refits what stays. The verdicts are about the default.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from measure import HELDOUT, WINDOW, Measured, measure, peer_oneshot, peer_versions, perplexity, save, tersor, use_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer-python", required=True, help="python of an environment with benchmarks/peers.txt")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--peer-dtype", choices=["auto", "float32"], default="auto")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads that each tool gets")
    arguments = parser.parse_args()
    threads = use_cores(arguments.threads)

    from tersor.ops.model.calibration import load_windows

    dense = perplexity(arguments.model, arguments.text)
    rows: dict[str, tuple[Measured, float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
        work = Path(folder)
        windows = load_windows(arguments.model, None, arguments.samples, WINDOW)
        (work / "windows.json").write_text(json.dumps(windows.tolist()))
        for method in ("sparsegpt", "wanda"):
            for repair in ("--repair", "--no-repair"):
                ours = tersor(
                    "prune", arguments.model, "-o", work / "out", "--remove", "weights", "--method", method, "--sparsity",
                    arguments.sparsity, "--samples", arguments.samples, "--seq-len", WINDOW, repair, "-q",
                )  # fmt: skip
                rows[f"tersor {method} {repair}"] = run(ours, work / "out", arguments.text)
            theirs = peer_oneshot(
                arguments.peer_python, arguments.model, work, arguments.peer_dtype, method, arguments.sparsity
            )
            rows[f"llm-compressor {method}"] = run(theirs, work / "peer", arguments.text)

    print(f"{dense['tokens']} tokens of {arguments.text.name} in windows of {WINDOW}\n")
    print(f"{'':32s}{'seconds':>9s}{'peak GB':>9s}{'perplexity':>12s}")
    print(f"{'dense':32s}{'':18s}{dense['perplexity']:12.2f}")
    for name, (measured, found) in rows.items():
        print(f"{name:32s}{measured.seconds:9.1f}{measured.peak_anonymous_bytes / 1e9:9.2f}{found:12.2f}")
    verdicts = {}
    for method in ("sparsegpt", "wanda"):
        ours, theirs = rows[f"tersor {method} --repair"], rows[f"llm-compressor {method}"]
        speedup = theirs[0].seconds / ours[0].seconds
        verdicts[f"{method}, times as fast"] = {"value": round(speedup, 2), "goal": ">= 3", "reached": speedup >= 3}
        verdicts[f"{method}, perplexity against the peer's"] = {
            "value": round(ours[1] / theirs[1], 3),
            "goal": "<= 1",
            "reached": ours[1] <= theirs[1],
        }
    print()
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict['value']} (goal {verdict['goal']}): {'reached' if verdict['reached'] else 'MISSED'}")
    path = save(
        "prune_vs_llmcompressor" + ("" if arguments.peer_dtype == "auto" else "_float32"),
        {
            "model": arguments.model.name,
            "sparsity": arguments.sparsity,
            "calibration": f"{arguments.samples} x {WINDOW} tokens",
            "text": arguments.text.name,
            "text_tokens": dense["tokens"],
            "window_tokens": WINDOW,
            "threads": threads,
            "peer": peer_versions(arguments.peer_python),
            "peer_dtype": arguments.peer_dtype,
            "rows": {
                "dense": {"perplexity": dense["perplexity"]},
                **{name: {**vars(measured), "perplexity": found} for name, (measured, found) in rows.items()},
            },
            "verdicts": verdicts,
        },
    )
    print(f"written to {path}")


def run(command: list[str], output: Path, text: Path) -> tuple[Measured, float]:
    """What `command` took, and the perplexity of the checkpoint it wrote, which is removed."""
    print(f"running {' '.join(map(str, command[:8]))} …", file=sys.stderr)
    found = measure(command), perplexity(output, text)["perplexity"]
    print(f"  {found}", file=sys.stderr)
    shutil.rmtree(output)
    return found


if __name__ == "__main__":
    main()
