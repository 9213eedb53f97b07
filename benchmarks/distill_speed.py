"""Tokens a second of a distill step against a plain loop: transformers, torch's AdamW, KL of full logits.

    python benchmarks/distill_speed.py --model cache/smollm2

The student is the teacher with noise on its weights, both are float32; the loops take turns step by step, on the same batch,
in one process, and the median of the rounds counts. The losses are printed, to show that all compute the same.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from measure import save, use_cores

ROUNDS = 6
PLAIN = "transformers + AdamW"
NOISE = 0.05  # of the standard deviation of a matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    threads = use_cores(arguments.threads)

    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
        student = noisy(arguments.model, Path(folder) / "student")
        loops = {
            "tersor": ours(arguments, student),
            "tersor --no-nested": ours(arguments, student, nested=False),
            PLAIN: plain(arguments, student),
        }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    losses: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(ROUNDS + 1):
        for name, step in loops.items():
            began = time.perf_counter()
            losses[name].append(step(round_))
            if round_:
                seconds[name].append(time.perf_counter() - began)
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
        str(student), Path("unused"), str(arguments.model), steps=ROUNDS + 1, batch=arguments.batch,
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

    data = TrainingData(arguments.model, None, arguments.seq_len, arguments.batch, ROUNDS + 1, 0)
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
