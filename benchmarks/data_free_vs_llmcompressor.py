"""Data-free w4a16 of a 1.1 B-parameter checkpoint: time and memory against llm-compressor's model_free_ptq.

    python benchmarks/data_free_vs_llmcompressor.py --peer-python .venv-peers/bin/python \
        --model cache/random-1b --sharded-model cache/random-1b-4shards

Both tools can take a group's largest weight as its range (min-max), or search the range with the least error. The search
is what this toolkit does unless told `--no-clip`; min-max is what llm-compressor's W4A16 preset does, and its own search
(many minutes) is measured on request, so that like meets like. One run on one machine; inputs are read once beforehand, so that all find them in the
page cache, and outputs go to the disk that holds the model. `copy` reads and writes the input's bytes: the floor for
anything that goes over the whole file.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Measured, measure, peer_versions, save, use_cores

HERE = Path(__file__).parent
DEFAULT, MINMAX = "tersor, search (default)", "tersor, min-max"
FOUR_FILES = f"{DEFAULT}, 4 files"
PEER_SEARCH, PEER_DEFAULT = "llm-compressor, search", "llm-compressor, min-max (default)"


def tersor(model: Path, out: Path, *more: str) -> list[str]:
    command = [sys.executable, "-P", "-m", "tersor.cli.main", "quantize", str(model), "-o", str(out)]
    return [*command, "--scheme", "w4a16", "--group-size", "128", "-q", *more]


def relative_mse(out: Path, model: Path) -> float:
    """Mean of ||W' - W||^2 / ||W||^2 over the linears of the first block, whoever wrote them."""
    from tersor.formats.checkpoint import Checkpoint
    from tersor.formats.dense import DenseView

    ours, original = DenseView(Checkpoint(out)), Checkpoint(model)
    names = [name for name, entry in ours.tensors.items() if entry.scheme and ".layers.0." in name]
    found = []
    for name in names:
        weight = original.read(name).float()
        found.append(float((ours.read(name) - weight).square().sum() / weight.square().sum()))
    return sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sharded-model", type=Path, required=True, help="the same weights in several files")
    parser.add_argument("--peer-python", required=True, help="python of an environment with benchmarks/peers.txt")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads that each tool gets")
    parser.add_argument("--workers", type=int, default=1, help="max_workers of model_free_ptq: shards at once")
    parser.add_argument("--peer-search", action="store_true", help="measure llm-compressor's range search too")
    arguments = parser.parse_args()
    threads = use_cores(arguments.threads)
    one, four = arguments.model, arguments.sharded_model

    def peer(model: Path, observer: str) -> list[str]:
        script = HERE / "peers" / "llmcompressor_model_free.py"
        return [arguments.peer_python, str(script), str(model), str(out), str(arguments.workers), observer]

    rows: dict[str, Measured] = {}
    errors: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory(dir=one.parent) as folder:
        out = Path(folder) / "out"
        runs = {
            "copy": (one, ["cp", "-r", "--reflink=never", str(one), str(out)]),
            MINMAX: (one, tersor(one, out, "--no-clip")),
            DEFAULT: (one, tersor(one, out)),
            FOUR_FILES: (four, tersor(four, out)),
            PEER_DEFAULT: (one, peer(one, "memoryless_minmax")),
            f"{PEER_DEFAULT}, 4 files": (four, peer(four, "memoryless_minmax")),
        }
        if arguments.peer_search:
            runs[PEER_SEARCH] = (one, peer(one, "memoryless_mse"))
        for name, (model, command) in runs.items():
            subprocess.run(["cat", *map(str, model.glob("*.safetensors"))], stdout=subprocess.DEVNULL, check=True)
            subprocess.run(["sync"], check=True)
            print(f"running {name} …", file=sys.stderr)
            rows[name] = measure(command)
            print(f"  {rows[name]}", file=sys.stderr)
            errors[name] = None if name == "copy" else relative_mse(out, model)
            shutil.rmtree(out)

    print(f"{'':44s}{'seconds':>9s}{'anonymous GB':>14s}{'RSS GB':>8s}{'relative MSE':>14s}")
    for name, row in rows.items():
        memory = f"{row.peak_anonymous_bytes / 1e9:14.2f}{row.peak_rss_bytes / 1e9:8.2f}"
        print(f"{name:44s}{row.seconds:9.1f}{memory}" + (f"{errors[name]:14.5f}" if errors[name] is not None else ""))
    verdicts = judge(rows)
    print()
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict['value']} (goal {verdict['goal']}): {'reached' if verdict['reached'] else 'MISSED'}")
    path = save(
        "data_free_vs_llmcompressor",
        {
            "scheme": "w4a16 symmetric, groups of 128",
            "input_bytes": sum(file.stat().st_size for file in one.glob("*.safetensors")),
            "threads": threads,
            "peer": peer_versions(arguments.peer_python),
            "peer_workers": arguments.workers,
            "rows": {name: vars(row) | {"relative_mse": errors[name]} for name, row in rows.items()},
            "verdicts": verdicts,
        },
    )
    print(f"written to {path}")


def judge(rows: dict[str, Measured]) -> dict[str, dict]:
    def faster(ours: str, theirs: str) -> dict:
        value = rows[theirs].seconds / rows[ours].seconds
        return {"value": round(value, 2), "goal": ">= 2", "reached": value >= 2}

    def memory(ours: str, other: str, least: float, most: float, goal: str) -> dict:
        value = rows[ours].peak_anonymous_bytes / rows[other].peak_anonymous_bytes
        return {"value": round(value, 3), "goal": goal, "reached": least <= value <= most}

    like_for_like = {"times as fast, both min-max": faster(MINMAX, PEER_DEFAULT)}
    if PEER_SEARCH in rows:
        like_for_like["times as fast, both search"] = faster(DEFAULT, PEER_SEARCH)
    return like_for_like | {
        "times as fast, each tool's default": faster(DEFAULT, PEER_DEFAULT),
        "share of the anonymous memory": memory(DEFAULT, PEER_DEFAULT, 0, 1 / 3, "<= 1/3"),
        "anonymous memory, 4 files over 1": memory(FOUR_FILES, DEFAULT, 0.9, 1.1, "0.9 to 1.1"),
    }


if __name__ == "__main__":
    main()
