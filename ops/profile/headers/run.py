"""`tersor profile` from headers alone: no torch, no weights read, under a second whatever the size."""

from __future__ import annotations

from collections import Counter

from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.hardware import Hardware
from tersor.ops.model.facts import Facts, facts
from tersor.ops.model.operators import Operator, Pass, active_params, operators, total_flops
from tersor.ops.model.stored import stored_weights
from tersor.ops.profile.headers.advice import advice
from tersor.ops.profile.headers.alternatives import compare_formats
from tersor.ops.profile.headers.inventory import by_dtype, declared_sparsity, inventory
from tersor.ops.profile.headers.kv_cache import devices_needed, kv_cache
from tersor.ops.profile.headers.roofline import middle_step, serve
from tersor.ops.profile.headers.test_time import answer_costs
from tersor.ops.profile.request import Workload

LENGTHS = (1024, 8192, 32768)  # of answers; those beyond the context of the model are left out
TRIALS = (1, 16)


def profile_headers(checkpoint: Checkpoint, hardware: Hardware, workload: Workload) -> dict:
    """The report's `quality["headers"]`. Without a config.json, or with two stacks, only what is stored is told.

    Raises TersorError for a workload that is none, an encoding that is not read, and naming the key that a config lacks.
    """
    for key, least in (("batch", 1), ("prompt", 1), ("generate", 0), ("trials", 1)):
        if getattr(workload, key) < least:
            raise TersorError(f"--{key} {getattr(workload, key)} is not possible", f"it should be at least {least}")
    weights = stored_weights(checkpoint)
    unknown = _not_predicted(checkpoint)
    found = facts(checkpoint, weights) if unknown is None else None
    rows = inventory(weights, found)
    data = {
        "path": str(checkpoint.path),
        "params": sum(row["params"] for row in rows),
        "stored_bytes": sum(row["stored_bytes"] for row in rows),
        "tensors": len(checkpoint.tensors),
        "files": len(checkpoint.shards),
        "modules": rows,
        "dtypes": by_dtype(rows),
        "sparsity": declared_sparsity(checkpoint),
        "model": None,
        "warnings": [] if unknown is None else [{"code": "not-predicted", "message": unknown}],
    }
    if found is None:
        return data
    work = operators(found, weights)
    devices = devices_needed(found, data["stored_bytes"], hardware, workload.batch, workload.prompt + workload.generate)
    data |= {
        "model": _model(found, work),
        "hardware": _hardware(hardware, devices),
        "workload": {key: getattr(workload, key) for key in ("batch", "prompt", "generate", "trials")},
        "flops": _flops(found, work, workload),
        "serving": serve(found, work, hardware, workload, devices),
        "kv_cache": None,
        "formats": compare_formats(found, work, hardware, workload, devices, data["stored_bytes"]),
        "test_time": None,
    }
    if found.causal and found.attends:
        context = workload.prompt + workload.generate
        data["kv_cache"] = kv_cache(found, data["stored_bytes"], hardware, workload.batch, context, devices)
        data["test_time"] = _test_time(found, work, hardware, workload)
    data["warnings"] = advice(found, work, hardware, workload, devices, data)
    return data


def _not_predicted(checkpoint: Checkpoint) -> str | None:
    """Why work and speed cannot be told from headers."""
    if checkpoint.config is None:
        return "There is no config.json, which says how often and on what the weights are used: work and speed are not predicted."
    if checkpoint.config.get("is_encoder_decoder"):
        return "An encoder and a decoder, whose work depends on the lengths of both: work and speed are not predicted."
    return None


def _model(found: Facts, work: list[Operator]) -> dict:
    kinds = Counter(attention.kind for attention in found.attends)
    first = next(iter(found.attends), None)
    return {
        "family": found.family,
        "architecture": found.architecture,
        "layers": found.layers,
        "hidden": found.hidden,
        "vocab": found.vocab,
        "causal": found.causal,
        "context_tokens": found.context,
        "image_tokens": found.tokens_per_image,
        "attention_layers": dict(kinds),
        "heads": first and first.heads,
        "kv_heads": first and first.kv_heads,
        "head_dim": first and first.key_dim,
        "latent": list(first.latent) if first and first.latent else None,
        "window_tokens": next((spec.window for spec in found.attends if spec.window), None),
        "experts": found.experts,
        "experts_per_token": found.experts_per_token,
        "tied_head": found.tied,
        "active_params": active_params(work),
    }


def _hardware(hardware: Hardware, devices: int) -> dict:
    return {
        "name": hardware.name,
        "devices": devices,
        "peak_flops": hardware.peak_flops,
        "reachable_flops": {precision: hardware.flops(precision) for precision in hardware.peak_flops},
        "memory_bytes": hardware.memory_bytes,
        "memory_gbps": hardware.memory_gbps,
        "reachable_gbps": hardware.bytes_per_second / 1e9,
        "compute_efficiency": hardware.compute_efficiency,
        "memory_efficiency": hardware.memory_efficiency,
        "dequantize_efficiency": hardware.dequantize_efficiency,
        "kernel_floor_seconds": hardware.kernel_floor_seconds,
        "dollars_per_hour": hardware.dollars_per_hour,
    }


def _flops(found: Facts, work: list[Operator], workload: Workload) -> dict:
    """Per token. `square` is what torch.utils.flop_counter counts: masked pairs and all logits too."""
    new = found.tokens_per_image or workload.prompt
    whole = Pass(1, new, square=True, all_logits=True)
    result = {
        "prefill_flops_per_token": total_flops(work, Pass(1, new)) / new,
        "prefill_square_flops": total_flops(work, whole),
        "decode_flops_per_token": None,
    }
    if found.causal and workload.generate:
        result["decode_flops_per_token"] = total_flops(work, middle_step(workload, 1))
    return result


def _test_time(found: Facts, work: list[Operator], hardware: Hardware, workload: Workload) -> dict:
    active = active_params(work)
    step = Pass(workload.batch, 1, workload.prompt)
    weight_bytes = sum(
        operator.count * operator.touched(operator.rows(step)) * operator.weight_bytes
        for operator in work
        if hasattr(operator, "touched")
    )
    room = (found.context or LENGTHS[-1]) - workload.prompt
    lengths = sorted({length for length in (workload.generate, *LENGTHS) if 0 < length <= room}) or [
        max(1, workload.generate)
    ]
    trials = sorted({workload.trials, *TRIALS})
    peak = hardware.peak_flops[hardware.computes_in("bf16")]
    intensity = peak / (hardware.memory_gbps * 1e9)
    return answer_costs(found, active, weight_bytes, intensity, workload.batch, workload.prompt, lengths, trials)
