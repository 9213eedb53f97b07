"""Data-free w4a16 of a 1.1 B-parameter checkpoint: time and memory against llm-compressor's model_free_ptq.

    python benchmarks/data_free_vs_llmcompressor.py --peer-python .venv-peers/bin/python \
        --model cache/random-1b --sharded-model cache/random-1b-4shards

One run on one machine; inputs are read once beforehand, so that all find them in the page cache. `copy` reads and
writes the input's bytes: the floor for anything that goes over the whole file.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Measured, measure, peer_versions, save

HERE = Path(__file__).parent


def tersor(model: Path, out: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "tersor.cli.main", "quantize", str(model), "-o", str(out)]
    return [*command, "--scheme", "w4a16", "--group-size", "128", "-q", *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sharded-model", type=Path, required=True, help="the same weights in several files")
    parser.add_argument("--peer-python", required=True, help="python of an environment with benchmarks/peers.txt")
    parser.add_argument("--workers", type=int, default=1, help="max_workers of model_free_ptq")
    arguments = parser.parse_args()
    one, four = arguments.model, arguments.sharded_model
    peer = [arguments.peer_python, str(HERE / "peers" / "llmcompressor_model_free.py")]

    rows: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        runs = {
            "copy": ["cp", "-r", str(one), str(out)],
            "tersor, min-max": tersor(one, out, "--no-clip"),
            "tersor, clip search": tersor(one, out),
            "tersor, clip search, 4 files": tersor(four, out),
            "llm-compressor, min-max": [*peer, str(one), str(out), str(arguments.workers)],
            "llm-compressor, min-max, 4 files": [*peer, str(four), str(out), str(arguments.workers)],
        }
        for name, command in runs.items():
            source = four if "4 files" in name else one
            subprocess.run(["cat", *map(str, source.glob("*.safetensors"))], stdout=subprocess.DEVNULL, check=True)
            subprocess.run(["sync"], check=True)
            print(f"running {name} …", file=sys.stderr)
            rows[name] = measure(command)
            shutil.rmtree(out)

    theirs = rows["llm-compressor, min-max"]
    print(f"{'':34s}{'seconds':>9s}{'anonymous GB':>14s}{'RSS GB':>8s}{'speedup':>9s}{'memory':>8s}")
    ratios = {}
    for name, row in rows.items():
        speedup = theirs.seconds / row.seconds
        memory = row.peak_anonymous_bytes / theirs.peak_anonymous_bytes
        ratios[name] = {"speedup": round(speedup, 2), "share_of_memory": round(memory, 3)}
        print(
            f"{name:34s}{row.seconds:9.1f}{row.peak_anonymous_bytes / 1e9:14.2f}{row.peak_rss_bytes / 1e9:8.2f}"
            f"{speedup:9.1f}{memory:8.2f}"
        )
    print("\ngoals: speedup 2, memory at most 0.33, the same memory for one file as for four")
    path = save(
        "data_free_vs_llmcompressor",
        {
            "scheme": "w4a16 symmetric, groups of 128",
            "input_bytes": sum(file.stat().st_size for file in one.glob("*.safetensors")),
            "peer": peer_versions(arguments.peer_python),
            "peer_workers": arguments.workers,
            "rows": {name: vars(row) | ratios[name] for name, row in rows.items()},
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
