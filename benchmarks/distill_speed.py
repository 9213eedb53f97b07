"""Tokens a second of a distill step against a plain loop: transformers, torch's AdamW, KL of full logits.

    python benchmarks/distill_speed.py --model cache/smollm2

The student is the teacher with noise on its weights, both are float32. Every loop has a process of its own (beside another's
models the same products were seen to be 10 % slower), loops take turns, and the median of all their steps but the first of
a process counts. The losses are printed, to show that all compute the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import save, use_cores

ROUNDS, TURNS = 5, 2  # steps of a process, processes of a loop
PLAIN = "transformers + AdamW"
LOOPS = ("tersor", "tersor --no-nested", PLAIN)
NOISE = 0.05  # of the standard deviation of a matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--student", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    threads = use_cores(arguments.threads)
    if arguments.loop:
        return run(arguments, threads)
    seconds: dict[str, list[float]] = {name: [] for name in arguments.loops}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
        student = noisy(arguments.model, Path(folder) / "student")
        for _ in range(TURNS):
            for name in arguments.loops:
                command = [sys.executable, __file__, *sys.argv[1:], "--loop", name, "--student", student]
                done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                seconds[name] += found["seconds"][1:]
                losses[name] = found["losses"]
    tokens = arguments.batch * arguments.seq_len
    rows = {
        name: {
            "seconds_per_step": statistics.median(times),
            "tokens_per_second": tokens / statistics.median(times),
            "losses": losses[name],
        }
        for name, times in seconds.items()
    }
    for name, row in rows.items():
        print(
            f"{name:24s}{row['seconds_per_step']:8.2f} s a step{row['tokens_per_second']:8.0f} tokens/s  losses {row['losses'][:3]}"
        )
    ratios = {name: row["tokens_per_second"] / rows[PLAIN]["tokens_per_second"] for name, row in rows.items()}
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), "times the plain loop")
    path = save(
        "distill_speed",
        {
            "model": arguments.model.name, "batch": arguments.batch, "seq_len": arguments.seq_len, "threads": threads,
            "rows": rows, "ratios": ratios,
        },
    )  # fmt: skip
    print(f"written to {path}")


def run(arguments, threads: int) -> None:
    """One loop: prints the seconds and the loss of each step."""
    import torch

    torch.set_num_threads(threads)
    if arguments.loop == PLAIN:
        step = plain(arguments, arguments.student)
    else:
        step = ours(arguments, arguments.student, nested=arguments.loop == "tersor")
    seconds, losses = [], []
    for number in range(ROUNDS):
        began = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds, "losses": losses}))


def noisy(model: Path, folder: Path) -> Path:
    """A copy of `model` that is not quite the same, so that there is something to learn."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors"):
        tensors, generator = load_file(file), torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * NOISE
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, file, {"format": "pt"})
    return folder


def ours(arguments, student: Path, nested: bool = True):
    """One step of `tersor distill` with its defaults."""
    import torch
    from tersor.ops.distill.loop import Loop
    from tersor.ops.distill.ranks import Ranks
    from tersor.ops.distill.request import Request
    from tersor.ops.distill.saved import Saved
    from tersor.ops.distill.session import Session

    request = Request(
        str(student), Path("unused"), str(arguments.model), steps=ROUNDS, batch=arguments.batch,
        seq_len=arguments.seq_len, warmup=0, schedule="constant", nested=nested,
    )  # fmt: skip
    session = Session(request, torch.device("cpu"), Ranks())
    loop = Loop(session, Saved(Path("unused"), {}, Ranks(), resume=False, force=False), None)
    return lambda number: loop.step(number + 1)["loss"]


def plain(arguments, folder: Path):
    """What anybody would write."""
    import torch
    from tersor.ops.distill.data import TrainingData
    from transformers import AutoModelForCausalLM

    data = TrainingData(arguments.model, None, arguments.seq_len, arguments.batch, ROUNDS, 0)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-4, weight_decay=0.0, fused=True)

    def step(number: int) -> float:
        ids = data.ids(number)
        with torch.no_grad():
            target = torch.log_softmax(teacher(input_ids=ids).logits[:, :-1], -1)
        logits = torch.log_softmax(student(input_ids=ids).logits[:, :-1], -1)
        loss = torch.nn.functional.kl_div(logits, target, reduction="none", log_target=True).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


if __name__ == "__main__":
    main()
