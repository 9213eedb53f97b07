"""Memory plans of synthesised training steps against the lower bound and PyTorch's two allocator settings.

    python benchmarks/profile_memory.py [--quick]

Blocks of three shapes with the tensors that eager PyTorch saves for 2048 tokens in bfloat16, Adam in float32, under
pipeline schedules and recomputation. The bound is the most bytes alive at once: no placement can do with less. The goal
is a plan within 5 % of it.
"""

from __future__ import annotations

import argparse
import time
from random import Random

from measure import save
from tersor.formats.memory_trace import Block, Trace
from tersor.ops.profile.memory.caching_allocator import simulate
from tersor.ops.profile.memory.packing import pack, static_then_dynamic
from tersor.ops.profile.memory.synthesize import Experts, synthetic_trace

GOAL = 0.05
TOKENS = 2048


def gpt(hidden: int = 4096, vocabulary: int = 50_257) -> dict:
    """GPT-3 6.7B: LayerNorm in and out, q k v, attention, residual, the same again, 4 h wide GELU, dropout masks."""
    per_token = [2, 2, 2, 2, 2, 2, 1, 2, 2, 8, 8, 1]
    weights = [3 * hidden, hidden, 4 * hidden, 4 * hidden]
    return _model(hidden, per_token, [4, 0, 0, 0, 0, 2, 0, 4, 0, 0, 8], weights, vocabulary)


def llama(hidden: int = 4096, ffn: int = 11_008, vocabulary: int = 32_000) -> dict:
    """Llama-2-7B as transformers runs it: each RMSNorm keeps a float32 copy."""
    wide = 2 * ffn / hidden
    per_token = [4, 2, 2, 2, 2, 2, 2, 4, 2, 2, wide, wide, wide, wide]
    weights = [hidden] * 4 + [ffn] * 3
    return _model(hidden, per_token, [4, 4, 0, 2, 2, 0, 0, 4, 4, 0, 0, wide], weights, vocabulary)


def moe(hidden: int = 4096, ffn: int = 14_336, count: int = 8, vocabulary: int = 32_000) -> dict:
    """Mixtral-8x7B with a block's experts split over 8 ranks: the router decides how many tokens come to this one."""
    per_token = [4, 2, 2, 2, 0.5, 0.5, 2, 4, 2, 2]
    model = _model(
        hidden, per_token, [4, 4, 0, 2, 0, 0, 0, 4], [hidden, hidden // 4, hidden // 4, hidden, *[ffn] * 3], vocabulary
    )
    routed = Experts(count, int(2 * TOKENS * (2 * hidden + 8 * ffn)), tensors=5, concentration=4)
    return model | {"experts": routed}


def _model(hidden: int, per_token: list, scratch: list, widths: list[int], vocabulary: int) -> dict:
    """`per_token` and `scratch` in bytes per token and hidden unit, `widths` of square-ish weights `[width, hidden]`."""
    weights = [2 * hidden * width for width in widths]
    return {
        "saved": [int(one * TOKENS * hidden) for one in per_token],
        "temporaries": [int(one * TOKENS * hidden) for one in scratch],
        "weights": weights,
        "optimizer": [2 * size for size in weights for _ in range(3)],
        "head": [2 * TOKENS * vocabulary, 4 * TOKENS * vocabulary],
    }


MODELS = {"GPT-like": gpt, "Llama-like": llama, "MoE-like": moe}
SCHEDULES = {
    "one stage": {"layers": 8, "micro_batches": 2},
    "GPipe, stage 2 of 4": {"layers": 32, "micro_batches": 8, "stage": 1, "stages": 4, "schedule": "gpipe"},
    "1F1B, stage 1 of 4": {"layers": 32, "micro_batches": 8, "stages": 4},
    "1F1B, stage 4 of 4": {"layers": 32, "micro_batches": 8, "stage": 3, "stages": 4},
    "interleaved, stage 1 of 4": {"layers": 32, "micro_batches": 8, "stages": 4, "chunks": 2, "schedule": "interleaved"},
    "1F1B, selective recompute": {"layers": 32, "micro_batches": 8, "stages": 4, "recompute": "selective"},
    "1F1B, full recompute": {"layers": 32, "micro_batches": 8, "stages": 4, "recompute": "full"},
    "1F1B, unequal lengths": {"layers": 32, "micro_batches": 8, "stages": 4, "shortest": 0.5},
    "one stage, unequal lengths": {"layers": 8, "micro_batches": 8, "shortest": 0.25, "steps": 4},
}  # fmt: skip
LARGE = {"GPT-like": 16, "Llama-like": 16, "MoE-like": 8}  # micro-batches, for some 100,000 events


def random_trace(blocks: int) -> Trace:
    """No training step: any order of events, sizes from 512 B to 1 MiB, all equally likely on a log scale."""
    random = Random(0)
    events = random.sample(range(2 * blocks), 2 * blocks)
    pairs = [sorted(events[2 * index : 2 * index + 2]) for index in range(blocks)]
    made = [Block(str(index), int(2 ** random.uniform(9, 20)), *pair) for index, pair in enumerate(sorted(pairs))]
    return Trace(made, 2 * blocks)


def measured(model: str, schedule: str, trace: Trace) -> dict:
    began = time.perf_counter()
    packing = pack(trace)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    caching, expandable = simulate(trace), simulate(trace, expandable=True)
    above = packing.peak_bytes / packing.lower_bound_bytes - 1
    return {
        "model": model,
        "schedule": schedule,
        "events": trace.events,
        "lower_bound_bytes": packing.lower_bound_bytes,
        "plan_bytes": packing.peak_bytes,
        "plan_above_bound": round(above, 5),
        "plan_above_bound_without_residents": round(
            (packing.peak_bytes - packing.resident_bytes) / (packing.lower_bound_bytes - packing.resident_bytes) - 1, 5
        ),
        "static_then_dynamic_bytes": static_then_dynamic(trace),
        "method": packing.method,
        "tried_bytes": packing.tried,
        "caching_bytes": caching.reserved_peak_bytes,
        "expandable_bytes": expandable.reserved_peak_bytes,
        "packing_seconds": round(seconds, 3),
        "simulation_seconds": round(time.perf_counter() - began, 3),
        "reached": above <= GOAL,
    }


def show(row: dict) -> None:
    bound = row["lower_bound_bytes"]
    print(
        f"{row['model']:11} {row['schedule']:26} {row['events']:>7,} events  bound {bound / 2**30:7.2f} GiB  "
        f"plan +{100 * row['plan_above_bound']:5.2f} %  caching +{100 * (row['caching_bytes'] / bound - 1):5.1f} %  "
        f"expandable +{100 * (row['expandable_bytes'] / bound - 1):5.1f} %  {row['packing_seconds']:6.2f} s  {row['method']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the traces of 100,000 events, and without saving")
    arguments = parser.parse_args()
    pack(random_trace(300))  # compiles the loops
    rows = []
    for model, make in MODELS.items():
        for schedule, settings in SCHEDULES.items():
            rows.append(measured(model, schedule, synthetic_trace(**make(), **settings)))
            show(rows[-1])
    if arguments.quick:
        return
    for model, micro_batches in LARGE.items():
        trace = synthetic_trace(**MODELS[model](), layers=32, micro_batches=micro_batches)
        rows.append(measured(model, "one stage, large", trace))
        show(rows[-1])
    rows.append(measured("random", "lifetimes and sizes", random_trace(1000)))
    show(rows[-1])
    print(
        save("profile_memory", {"goal_above_bound": GOAL, "reached": all(row["reached"] for row in rows), "rows": rows})
    )


if __name__ == "__main__":
    main()
