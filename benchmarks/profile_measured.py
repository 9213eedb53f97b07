"""Does `profile --measure` predict the time of the whole model? Held-out prompts and answers, run by transformers itself.

    python benchmarks/profile_measured.py --model cache/smollm2

The fit sees single blocks with made-up weights. Held against it is `from_pretrained(MODEL).generate`, greedy, in float32,
at pairs of prompt and answer that no point of the fit is. Both take turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from measure import save
from tersor.formats.checkpoint import Checkpoint
from tersor.ops.model.bare import BareModel
from tersor.ops.profile.measure.run import make_stands
from tersor.ops.profile.measure.runtime import Fits, measure_rounds
from tersor.ops.profile.request import Workload
from transformers import AutoModelForCausalLM

FITTED = Workload(batch=1, prompt=512, generate=128)
PAIRS = [(50, 8), (50, 64), (120, 32), (200, 100), (300, 4), (450, 48), (600, 16)]
RUNS = 3  # of each pair; the median counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    real = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    bare = BareModel(Checkpoint(arguments.model), torch.device("cpu"), torch.float32)
    kinds = bare.kinds()
    stands = make_stands(bare, kinds, FITTED)
    times: dict[tuple[int, int], list[float]] = {pair: [] for pair in PAIRS}
    run_real(real, *PAIRS[0])

    def after_round(number: int) -> None:
        for pair in PAIRS[number % RUNS :: RUNS]:
            if len(times[pair]) < RUNS:
                times[pair].append(run_real(real, *pair))

    rounds, _ = measure_rounds(bare, kinds, stands, after_round=after_round, budget_seconds=float("inf"))
    fits = Fits(rounds)
    rows = []
    for (prompt, generated), seconds in times.items():
        predicted, low, high = fits.total(prompt, generated)
        measured = sorted(seconds)[len(seconds) // 2]
        rows.append(
            {
                "prompt": prompt,
                "generate": generated,
                "predicted_seconds": round(predicted, 3),
                "interval_seconds": [round(low, 3), round(high, 3)],
                "measured_seconds": round(measured, 3),
                "all_measured_seconds": [round(value, 3) for value in seconds],
                "error": round(predicted / measured - 1, 4),
            }
        )
        print(
            f"{prompt:4} in {generated:4} out  predicted {predicted:6.2f} s ({low:.2f} to {high:.2f})  measured "
            f"{measured:6.2f} s  {predicted / measured - 1:+.1%}"
        )
    errors = [abs(row["error"]) for row in rows]
    path = save(
        "profile_measured",
        {
            "model": arguments.model.name,
            "threads": torch.get_num_threads(),
            "dtype": "float32",
            "fit": {
                "prompts": [stand.tokens for stand in stands],
                "rounds": len(rounds),
                "blocks_timed": stands[0].chosen,
            },
            "largest_error": max(errors),
            "mean_error": round(sum(errors) / len(errors), 4),
            "rows": rows,
        },
    )
    print(f"largest error {max(errors):.1%}, written to {path}")


@torch.no_grad()
def run_real(model, prompt: int, generated: int) -> float:
    """Seconds that transformers' own generate takes."""
    ids = torch.randint(5, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(prompt))
    began = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=generated,
        max_new_tokens=generated,
        do_sample=False,
        pad_token_id=0,
    )
    seconds = time.perf_counter() - began
    assert output.shape[1] == prompt + generated
    return seconds


if __name__ == "__main__":
    main()
