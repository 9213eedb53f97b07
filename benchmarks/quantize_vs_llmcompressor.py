"""GPTQ to 4 bits: this toolkit and llm-compressor on the same token windows, one after the other on one machine.

    python benchmarks/quantize_vs_llmcompressor.py --peer-python .venv-peers/bin/python --model cache/smollm2

Both get the same 32 x 512 tokens of the shipped calibration text, groups of 64, symmetric, and the same cores and threads.
llm-compressor runs with its defaults, in the dtype that `--peer-dtype` loads the model in: `auto`, the checkpoint's own, or
`float32`, which this toolkit computes in and which is faster on most CPUs. The
perplexities of all results are measured by `tersor evaluate`, on prose by the same author from another novel.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measure import HELDOUT, WINDOW, Measured, measure, peer_oneshot, peer_versions, perplexity, save, tersor, use_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer-python", required=True, help="python of an environment with benchmarks/peers.txt")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--peer-dtype", choices=["auto", "float32"], default="auto")
    parser.add_argument("--awq", action="store_true", help="a row for our awq too, which takes minutes")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads that each tool gets")
    arguments = parser.parse_args()
    threads = use_cores(arguments.threads)

    from tersor.ops.model.calibration import load_windows

    rows: dict[str, tuple[Measured | None, dict]] = {"dense": (None, perplexity(arguments.model, arguments.text))}
    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
        work = Path(folder)
        windows = load_windows(arguments.model, None, arguments.samples, WINDOW)
        (work / "windows.json").write_text(json.dumps(windows.tolist()))
        common = ("--scheme", "w4a16", "--group-size", arguments.group_size, "-q")
        calibration = ("--samples", arguments.samples, "--seq-len", WINDOW)
        runs = {
            "tersor gptq": tersor("quantize", arguments.model, "-o", work / "gptq", "--method", "gptq", *calibration, *common),
            "tersor awq": tersor("quantize", arguments.model, "-o", work / "awq", "--method", "awq", *calibration, *common),
            "tersor rtn": tersor("quantize", arguments.model, "-o", work / "rtn", "--method", "rtn", *common),
            "llm-compressor gptq": peer_oneshot(
                arguments.peer_python, arguments.model, work, arguments.peer_dtype, "gptq", arguments.group_size
            ),
        }  # fmt: skip
        if not arguments.awq:
            del runs["tersor awq"]
        for name, command in runs.items():
            print(f"running {name} …", file=sys.stderr)
            output = work / (name.split()[1] if name.startswith("tersor") else "peer")
            rows[name] = measure(command), perplexity(output, arguments.text)
            print(f"  {rows[name][0]}, perplexity {rows[name][1]['perplexity']:.2f}", file=sys.stderr)

    dense = rows["dense"][1]["perplexity"]
    ours, theirs = rows["tersor gptq"], rows["llm-compressor gptq"]
    speedup = theirs[0].seconds / ours[0].seconds
    lost_by_us, lost_by_them = (row[1]["perplexity"] - dense for row in (ours, theirs))
    lost = lost_by_us / lost_by_them
    quality = rows["dense"][1]
    print(f"{quality['tokens']} tokens of {arguments.text.name} in windows of {WINDOW}\n")
    print(f"{'':22s}{'seconds':>9s}{'peak GB':>9s}{'perplexity':>12s}{'lost':>8s}")
    for name, (measured, found) in rows.items():
        cost = f"{measured.seconds:9.1f}{measured.peak_anonymous_bytes / 1e9:9.2f}" if measured else " " * 18
        print(f"{name:22s}{cost}{found['perplexity']:12.2f}{found['perplexity'] - dense:8.2f}")
    verdicts = {
        "times as fast": {"value": round(speedup, 2), "goal": ">= 3", "reached": speedup >= 3},
        "share of the perplexity lost": {
            "value": round(lost, 3),
            "goal": "<= 0.5",
            "reached": lost_by_us <= lost_by_them / 2,
        },
    }
    print()
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict['value']} (goal {verdict['goal']}): {'reached' if verdict['reached'] else 'MISSED'}")
    path = save(
        "quantize_vs_llmcompressor" + ("" if arguments.peer_dtype == "auto" else "_float32"),
        {
            "model": arguments.model.name,
            "scheme": f"w4a16 symmetric, groups of {arguments.group_size}",
            "calibration": f"{arguments.samples} x {WINDOW} tokens",
            "text": arguments.text.name,
            "text_tokens": quality["tokens"],
            "window_tokens": WINDOW,
            "threads": threads,
            "peer": peer_versions(arguments.peer_python),
            "peer_dtype": arguments.peer_dtype,
            "rows": {
                name: {**(vars(measured) if measured else {}), "perplexity": found["perplexity"]}
                for name, (measured, found) in rows.items()
            },
            "verdicts": verdicts,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
