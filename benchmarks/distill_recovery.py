"""How much of the perplexity that pruning cost comes back by distilling, on text that was never seen in training.

    python benchmarks/distill_recovery.py --model cache/smollm2 [--students layers weights] [--steps 200]

Students: a quarter of the layers removed; half of the weights removed by SparseGPT, whose zeros have to stay. Training text is
the prose that ships with the package, scored is another novel. About 40 minutes a student on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from measure import HELDOUT, WINDOW, perplexity, save, tersor, use_cores

STUDENTS = {
    "layers": ["--remove", "layers", "--sparsity", 0.25],
    "weights": ["--remove", "weights", "--method", "sparsegpt", "--sparsity", 0.5],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("options", nargs="*", help="more options of distill, after --")
    arguments = parser.parse_args()
    use_cores(2)
    dense = perplexity(arguments.model)["perplexity"]
    print(f"{'':10s}{'dense':>10s}{'pruned':>10s}{'distilled':>11s}{'recovered':>11s}{'tokens/s':>10s}  zeros kept")
    rows = {}
    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
        for name in arguments.students:
            row = rows[name] = recover(arguments, Path(folder) / name, STUDENTS[name], dense)
            print(
                f"{name:10s}{dense:10.2f}{row['pruned']:10.2f}{row['distilled']:11.2f}{row['recovered']:11.1%}"
                f"{row['tokens_per_second']:10.0f}  "
                f"{'–' if row['zeros_kept'] is None else row['zeros_kept']}"
            )
    path = save(
        "distill_recovery",
        {
            "model": arguments.model.name,
            "text": f"{HELDOUT.name}, windows of {WINDOW} tokens",
            "training": f"{arguments.steps} steps of {arguments.batch} x {arguments.seq_len} tokens, {arguments.options}",
            "dense": dense,
            "rows": rows,
        },
    )
    print(f"written to {path}")


def recover(arguments, folder: Path, how: list, dense: float) -> dict:
    """Prune, distill, and score both."""
    pruned, distilled = folder / "pruned", folder / "distilled"

    def run(*command) -> dict:
        done = subprocess.run(tersor(*command, "--json", "-q"), check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    calibration = ["--samples", arguments.samples, "--seq-len", WINDOW]
    run("prune", arguments.model, "-o", pruned, *how, *calibration)
    report = run(
        "distill", pruned, "--teacher", arguments.model, "-o", distilled, "--steps", arguments.steps,
        "--batch", arguments.batch, "--seq-len", arguments.seq_len, *arguments.options,
    )  # fmt: skip
    before, after = perplexity(pruned)["perplexity"], perplexity(distilled)["perplexity"]
    return {
        "pruned": before,
        "distilled": after,
        "recovered": (before - after) / (before - dense),
        "tokens_per_second": report["quality"]["training"]["tokens_per_second"],
        "seconds": report["seconds"],
        "zeros_kept": zeros_kept(pruned, distilled),
        "memory": report["quality"]["memory"],
    }


def zeros_kept(before: Path, after: Path) -> bool | None:
    """Whether every weight that was zero is still, in linear layers with a mask; None where there are none."""
    from safetensors.torch import load_file

    left, right = (load_file(folder / "model.safetensors") for folder in (before, after))
    masked = [name for name, tensor in left.items() if "_proj" in name and (tensor == 0).float().mean() > 0.01]
    return all(bool((right[name][left[name] == 0] == 0).all()) for name in masked) if masked else None


if __name__ == "__main__":
    main()
