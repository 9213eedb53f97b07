"""What a profile from headers takes: two published models of 400 B parameters and more, their data holes on disk.

    python benchmarks/profile_headers.py [--runs 5]

Every run is a process of its own: Python starts, every header is read and checked, the profile and its page are made.
The median of the runs is kept, and the highest memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from measure import measure, save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import header_models

SECONDS, BYTES = 1.0, 100e6  # to reach, for 400 B parameters
SHARD_BYTES = 2_000_000_000
MODELS = {
    "Llama-3.1-405B": (header_models.LLAMA_405B, header_models.llama_shapes),
    "DeepSeek-V3": (header_models.DEEPSEEK_V3, header_models.deepseek_shapes),
}
PROFILE = """
import sys
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.hardware import load_hardware
from tersor.ops.profile.headers.page import sections
from tersor.ops.profile.headers.run import profile_headers
from tersor.ops.profile.request import Workload
assert sections(profile_headers(Checkpoint(sys.argv[1]), load_hardware("h100"), Workload()))
assert "torch" not in sys.modules
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    rows = []
    for name, (config, shapes_of) in MODELS.items():
        shapes = shapes_of(config)
        with tempfile.TemporaryDirectory() as scratch:
            folder = header_models.write_model(Path(scratch) / "model", config, shapes, shard_bytes=SHARD_BYTES)
            files = len(list(folder.glob("*.safetensors")))
            measured = [measure([sys.executable, "-c", PROFILE, str(folder)]) for _ in range(runs)]
        seconds = statistics.median(run.seconds for run in measured)
        peak = max(run.peak_rss_bytes for run in measured)
        reached = seconds < SECONDS and peak < BYTES
        rows.append(
            {
                "model": name,
                "files": files,
                "tensors": len(shapes),
                "seconds": seconds,
                "peak_rss_bytes": peak,
                "reached": reached,
            }
        )
        print(
            f"{name}: {files} files, {len(shapes):,} tensors: {seconds:.2f} s, {peak / 1e6:.0f} MB{'' if reached else ', not reached'}"
        )
    print(save("profile_headers", {"goal_seconds": SECONDS, "goal_peak_rss_bytes": BYTES, "runs": runs, "rows": rows}))


if __name__ == "__main__":
    main()
