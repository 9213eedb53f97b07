"""What the roofline (ops.model.roofline) predicts for a workload: a table of one pass, and how fast the model serves."""

from __future__ import annotations

from tersor.formats.hardware import Hardware
from tersor.ops.model.facts import Facts
from tersor.ops.model.operators import Linear, Operator, Pass
from tersor.ops.model.roofline import REDUCTIONS_PER_LAYER, reduction_seconds, seconds_of
from tersor.ops.profile.request import Workload


def predict(facts: Facts, found: list[Operator], run: Pass, hardware: Hardware, devices: int = 1) -> dict:
    """One pass: totals and a row per operator (numbers are those of all equal ones together, seconds in a row)."""
    rows, bounds = [], {"compute": 0.0, "memory": 0.0, "launch": 0.0}
    for operator in found:
        seconds, bound = seconds_of(operator, run, hardware, devices)
        flops, nbytes = operator.count * operator.flops(run), operator.count * operator.bytes(run)
        bounds[bound] += operator.count * seconds
        rows.append(
            {
                "name": operator.name,
                "kind": operator.kind,
                "count": operator.count,
                "shape": list(operator.shape) if isinstance(operator, Linear) else None,
                "dtype": operator.label if isinstance(operator, Linear) else None,
                "precision": hardware.computes_in(operator.precision),
                "flops": flops,
                "moved_bytes": nbytes,
                "flops_per_byte": flops / nbytes if nbytes else 0.0,
                "seconds": operator.count * seconds,
                "bound": bound,
            }
        )
    reduction = reduction_seconds(facts, run, hardware, devices)
    if reduction:
        bounds["link"] = reduction
        rows.append(
            {"name": "all-reduce", "kind": "other", "count": REDUCTIONS_PER_LAYER * facts.layers, "shape": None, "dtype": None, "precision": None,
             "flops": 0.0, "moved_bytes": 0.0, "flops_per_byte": 0.0, "seconds": reduction, "bound": "link"}
        )  # fmt: skip
    flops, nbytes = sum(row["flops"] for row in rows), sum(row["moved_bytes"] for row in rows)
    return {
        "batch": run.batch,
        "new_tokens": run.new,
        "past_tokens": run.past,
        "flops": flops,
        "moved_bytes": nbytes,
        "flops_per_byte": flops / nbytes,
        "seconds": sum(row["seconds"] for row in rows),
        "bound_seconds": bounds,
        "operators": rows,
    }


def prompt_pass(facts: Facts, workload: Workload) -> Pass:
    """Reading the prompt, or for images all of one."""
    return Pass(workload.batch, facts.tokens_per_image or workload.prompt)


def middle_step(workload: Workload, batch: int | None = None) -> Pass:
    """The step that adds one token to each sequence half way through the answer."""
    return Pass(batch or workload.batch, 1, workload.prompt + workload.generate // 2)


def serve(facts: Facts, found: list[Operator], hardware: Hardware, workload: Workload, devices: int) -> dict:
    """The workload on `devices`: time to the first token, per token, tokens a second, dollars per million tokens."""
    prefill = predict(facts, found, prompt_pass(facts, workload), hardware, devices)
    price = None if hardware.dollars_per_hour is None else devices * hardware.dollars_per_hour / 3600
    read = workload.batch * prefill["new_tokens"]
    data = {
        "prefill": prefill,
        "decode": None,
        "first_token_seconds": prefill["seconds"],
        "prompt_tokens_per_second": read / prefill["seconds"],
        "dollars_per_million_prompt_tokens": None if price is None else price * prefill["seconds"] / read * 1e6,
    }
    if not facts.causal or workload.generate < 1:
        return data
    decode = predict(facts, found, middle_step(workload), hardware, devices)
    step, steps = decode["seconds"], workload.generate - 1  # the prompt's pass gives the first token
    total = prefill["seconds"] + steps * step
    return data | {
        "decode": decode,
        "token_seconds": step,
        "total_seconds": total,
        "decode_tokens_per_second": workload.batch / step,
        "tokens_per_second": workload.batch * workload.generate / total,
        "dollars_per_million_generated_tokens": None if price is None else price * step / workload.batch * 1e6,
        "dollars_per_million_tokens": None
        if price is None
        else price * total / (workload.batch * (workload.prompt + workload.generate)) * 1e6,
    }
