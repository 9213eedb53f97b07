"""Time a command and the most memory that it and its children held, and say on what machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

SAMPLE_SECONDS = 0.02
HERE = Path(__file__).parent
RESULTS = HERE / "results"
HELDOUT = HERE / "data" / "heldout.txt"
WINDOW = 512  # tokens, of calibration and of what is scored
SCORED = 64  # windows of the text


@dataclass
class Measured:
    """`peak_anonymous_bytes` leaves out what files back (libraries, mapped weights); `peak_rss_bytes` has it all."""

    seconds: float
    peak_anonymous_bytes: int
    peak_rss_bytes: int


def measure(command: list[str], **environment: str) -> Measured:
    """Run `command` to its end, sampling the memory of its process tree. Raises SystemExit with its last lines when it
    fails."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )
    peak = {"RssAnon": 0, "VmRSS": 0}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            for key, value in _memory(process.pid).items():
                peak[key] = max(peak[key], value)

    sampler = threading.Thread(target=sample)
    sampler.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - began
    done.set()
    sampler.join()
    if process.returncode:
        raise SystemExit(f"error: {' '.join(command)} exited with {process.returncode}\n{output[-3000:]}")
    return Measured(round(seconds, 2), peak["RssAnon"], peak["VmRSS"])


def _memory(root: int) -> dict[str, int]:
    """Bytes of a process and all its children now."""
    total = {"RssAnon": 0, "VmRSS": 0}
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        try:
            # A child is listed under the thread that started it.
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                waiting += [int(child) for child in children.read_text().split()]
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                key = line.partition(":")[0]
                if key in total:
                    total[key] += int(line.split()[1]) * 1024
        except OSError:
            continue  # ended between two reads
    return total


def tersor(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-m", "tersor.cli.main", *map(str, arguments)]


def perplexity(model: Path, text: Path = HELDOUT) -> dict:
    """The `quality` of `tersor evaluate`, for every tool's output alike."""
    command = tersor("evaluate", model, "--text", text, "--seq-len", WINDOW, "--max-windows", SCORED, "--json", "-q")
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["quality"]


def peer_oneshot(python: str, model: Path, work: Path, dtype: str, method: str, amount: object) -> list[str]:
    """llm-compressor's command that reads `work`/windows.json and writes `work`/peer."""
    script = HERE / "peers" / "llmcompressor_oneshot.py"
    paths = [python, script, model, work / "peer", work / "windows.json"]
    return [*map(str, paths), dtype, method, str(amount)]


def use_cores(count: int) -> int:
    """Keep this process and all it starts on `count` cores, with as many threads. Returns how many there are to have."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    return len(cores)


def machine() -> dict:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {"cpu": name, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30)}
    found |= {package: version(package) for package in ("torch", "triton", "transformers")}
    import torch

    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def peer_versions(python: str) -> dict[str, str]:
    code = "import json; from importlib.metadata import version as v; print(json.dumps({p: v(p) for p in ('llmcompressor', 'compressed-tensors', 'torch', 'transformers')}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def save(name: str, content: dict) -> Path:
    """Write a result with the machine it was measured on to benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    plain = {key: asdict(value) if isinstance(value, Measured) else value for key, value in content.items()}
    path.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine(), **plain}, indent=2) + "\n")
    return path
