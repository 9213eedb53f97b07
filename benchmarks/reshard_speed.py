"""What moving a checkpoint between layouts takes: a synthetic Llama, cut TP4·PP2, moved to TP2·PP4 and back.

    python benchmarks/reshard_speed.py [--gigabytes 8] [--scratch FOLDER]

Each step is a process of its own, from the start of Python to the last byte on disk: files are flushed before a result
gets its name. `cp` copies the same folder, once as it is (its bytes may still be in memory when it ends) and once with
`sync` after it. Before every step the disk is synced, so that none pays for the writes of another. The steps are repeated
and the median is kept. At the end the files of both TP4·PP2 layouts are compared byte by byte, and `verify` checks the
shards against the source.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import measure, save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import header_models

GOAL_SHARE, GOAL_BYTES = 0.5, 1e9  # of cp's speed; most memory
CONFIG = header_models.LLAMA_8B | {"vocab_size": 64_000}
SHARD_BYTES = 5_000_000_000
FIRST, SECOND = {"tp": 4, "pp": 2}, {"tp": 2, "pp": 4}
WRITE = """
import json, sys
from pathlib import Path
from tersor.formats.checkpoint import Checkpoint
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.shards.write import write_shards
model, layout, out, *source = sys.argv[1:]
write_shards(PlanModel(Checkpoint(model)), Layout(**json.loads(layout)), Path(out), source=Path(source[0]) if source else None)
assert "torch" not in sys.modules
"""
VERIFY = """
import sys
from pathlib import Path
from tersor.formats.checkpoint import Checkpoint
from tersor.ops.plan_parallel.shards.verify import verify_shards
problems = verify_shards(Path(sys.argv[1]), Checkpoint(sys.argv[2]))
assert not problems, problems
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        compare(Path(scratch), options.gigabytes, options.runs)


def compare(scratch: Path, gigabytes: float, runs: int) -> None:
    model = synthetic(scratch / "model", gigabytes * 1e9)
    nbytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    first, second, back = (str(scratch / name) for name in ("first", "second", "back"))
    write = [sys.executable, "-c", WRITE, str(model)]
    to_first, to_second = ([*write, json.dumps(layout)] for layout in (FIRST, SECOND))
    steps = {
        "cp": (["cp", "-r", first, str(scratch / "copy")], scratch / "copy"),
        "cp and sync": (["sh", "-c", 'cp -r "$0" "$1" && sync', first, str(scratch / "copy")], scratch / "copy"),
        "checkpoint to TP4·PP2": ([*to_first, first], scratch / "first"),
        "TP4·PP2 to TP2·PP4": ([*to_second, second, first], scratch / "second"),
        "TP2·PP4 to TP4·PP2": ([*to_first, back, second], scratch / "back"),
        "verify against the checkpoint": ([sys.executable, "-c", VERIFY, second, str(model)], None),
    }
    measured: dict[str, list] = {name: [] for name in steps}
    measure([*to_first, first])  # what cp copies; it also compiles the hash
    for _ in range(runs):
        for name, (command, out) in steps.items():
            if out is not None:
                shutil.rmtree(out, ignore_errors=True)
            os.sync()
            measured[name].append(measure(command))
    same = all(filecmp.cmp(file, Path(back) / file.name, shallow=False) for file in Path(first).iterdir())
    seconds = {name: statistics.median(run.seconds for run in found) for name, found in measured.items()}
    rows = [
        {
            "step": name,
            "seconds": seconds[name],
            "gbps": nbytes / seconds[name] / 1e9,
            "of_cp": seconds["cp"] / seconds[name],
            "of_cp_and_sync": seconds["cp and sync"] / seconds[name],
            "peak_rss_bytes": max(run.peak_rss_bytes for run in found),
            "runs_seconds": [run.seconds for run in found],
        }
        for name, found in measured.items()
    ]
    for row in rows:
        row["reached"] = row["peak_rss_bytes"] < GOAL_BYTES and row["of_cp_and_sync"] >= GOAL_SHARE
        print(
            f"{row['step']:32} {row['seconds']:7.2f} s {row['gbps']:6.2f} GB/s, {row['of_cp']:.2f} of cp, "
            f"{row['of_cp_and_sync']:.2f} of cp and sync, {row['peak_rss_bytes'] / 1e6:5.0f} MB"
        )
    print("the same bytes after the way there and back" if same else "the bytes differ after the way there and back")
    save("reshard_speed", {"bytes": nbytes, "same_bytes": same, "rows": rows})
    if not same:
        raise SystemExit(1)


def synthetic(folder: Path, nbytes: float) -> Path:
    """A Llama of about so many bytes, of random bits."""
    one, two = (header_models.llama_shapes(CONFIG | {"num_hidden_layers": layers}) for layers in (1, 2))
    sizes = [2 * sum(int(np.prod(shape)) for shape in shapes.values()) for shapes in (one, two)]
    layers = max(4, round((nbytes - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    config = CONFIG | {"num_hidden_layers": layers - layers % 4}
    header_models.write_model(folder, config, header_models.llama_shapes(config), shard_bytes=SHARD_BYTES)
    generator = np.random.default_rng(0)
    for file in folder.glob("*.safetensors"):
        size = file.stat().st_size
        with open(file, "r+b") as stream:
            stream.seek(8 + int.from_bytes(stream.read(8), "little"))
            while stream.tell() < size:
                stream.write(generator.bytes(min(64 << 20, size - stream.tell())))
    return folder


if __name__ == "__main__":
    main()
