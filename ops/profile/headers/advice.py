"""Sentences where a smaller format does not make the model faster, or the model does not fit what it is asked to do."""

from __future__ import annotations

from tersor.formats.hardware import Hardware
from tersor.formats.units import count, number, percent, size
from tersor.ops.model.facts import Facts
from tersor.ops.model.operators import Linear, Operator
from tersor.ops.profile.headers.roofline import middle_step
from tersor.ops.profile.request import Workload

NOTABLE = 0.02  # a change of speed below this is not worth a sentence


def advice(
    facts: Facts, found: list[Operator], hardware: Hardware, workload: Workload, devices: int, data: dict
) -> list[dict]:
    """[{code, message}] from the numbers of the profile so far (`run.profile_headers`)."""
    linears = [operator for operator in found if isinstance(operator, Linear)]
    formats = {row["format"]: row for row in data["formats"]}
    said = [
        *_fit(facts, hardware, workload, devices, data),
        *_precision(linears, hardware),
        *_weight_only(linears, formats, workload, facts),
        *_sparsity(data["sparsity"], hardware),
    ]
    recurrent = sum(attention.recurrent for attention in facts.attends)
    if recurrent:
        said.append(
            (
                "state-not-counted",
                f"{recurrent} layers keep a state instead of a cache: its bytes and updates are not counted.",
            )
        )
    if data["serving"]["decode"]:
        said += _decode(facts, linears, workload, data)
    return [{"code": code, "message": message} for code, message in said]


def _fit(facts: Facts, hardware: Hardware, workload: Workload, devices: int, data: dict) -> list[tuple[str, str]]:
    said = []
    if devices > 1:
        said.append(
            (
                "does-not-fit",
                f"{size(data['stored_bytes'])} of weights and {size(data['kv_cache']['workload_bytes'])} of cache do not fit one "
                f"{hardware.name}: the times are those of {devices}, sharing the work evenly with two all-reduces a layer.",
            )
        )
    total = workload.prompt + workload.generate if facts.causal else workload.prompt
    if facts.context and facts.tokens_per_image is None and total > facts.context:
        said.append(
            (
                "beyond-context",
                f"{total:,} tokens are asked for, config.json allows {facts.context:,}: quality is not known there.",
            )
        )
    return said


def _precision(linears: list[Linear], hardware: Hardware) -> list[tuple[str, str]]:
    said = []
    for precision, named in (("fp8", "8-bit floats"), ("int8", "int8")):
        if any(operator.precision == precision for operator in linears) and not hardware.supports(precision):
            said.append(
                (
                    f"no-{precision}",
                    f"{hardware.name} does not multiply {named}: they are unpacked to {hardware.computes_in(precision)} first, "
                    "which saves memory and no arithmetic.",
                )
            )
    return said


def _weight_only(
    linears: list[Linear], formats: dict[str, dict], workload: Workload, facts: Facts
) -> list[tuple[str, str]]:
    """Weights that are unpacked before the product: of the checkpoint, or of the int4 that one may be about to make."""
    stored = any(operator.unpacks for operator in linears)
    row = formats["as stored" if stored else "w4a16"]
    batch, prefill, decode = row.get("slower_from_batch"), row["prefill_speedup"], row.get("decode_speedup")
    parts = []
    if decode is not None:
        at = f"decoding at batch {workload.batch:,} {number(decode, 2)} times as fast as with bf16"
        parts.append(at if batch is None else f"{at}, slower from batch {batch:,} on")
    if prefill < 1 - NOTABLE:
        what = "an image" if facts.tokens_per_image else f"a prompt of {workload.prompt:,} tokens"
        parts.append(f"{what} takes {number(1 / prefill)} times as long")
    if batch is None and prefill >= 1 - NOTABLE:
        return []
    code = "weight-only-slower" if (decode or prefill) < 1 else "weight-only"
    name = "The stored weights are" if stored else "w4a16 weights would be"
    return [(code, f"{name} unpacked to bf16 before every product. Predicted: {'; '.join(parts)}.")]


def _sparsity(declared: dict | None, hardware: Hardware) -> list[tuple[str, str]]:
    if declared is None:
        return []
    share = "Zeros" if declared["sparsity"] is None else f"{percent(declared['sparsity'])} zeros"
    if declared["pattern"] == "2:4":
        if hardware.sparse_speedup <= 1:
            return [
                (
                    "no-2:4",
                    f"{share} in a 2:4 pattern, which {hardware.name} has no arithmetic for: they cost what dense weights cost.",
                )
            ]
        return [
            (
                "2:4-stored-dense",
                f"{share} in a 2:4 pattern, stored dense: the times are those of dense kernels. Kernels for 2:4 would make the "
                f"products up to {number(hardware.sparse_speedup)} times as fast (row 2:4 of the formats).",
            )
        ]
    return [
        (
            "zeros-are-read",
            f"{share} ({declared['pattern']}), stored dense: dense kernels read and multiply them, so that nothing is faster. Kernels "
            "that unpack sparse weights break even at about 60 to 70 % zeros (Flash-LLM), and only while decoding is bound by memory.",
        )
    ]


def _decode(facts: Facts, linears: list[Linear], workload: Workload, data: dict) -> list[tuple[str, str]]:
    said = []
    decode = data["serving"]["decode"]
    run = middle_step(workload)
    weights = sum(operator.count * operator.touched(operator.rows(run)) * operator.weight_bytes for operator in linears)
    cache = sum(row["moved_bytes"] for row in decode["operators"] if row["name"].startswith("scores"))
    if cache > weights:
        said.append(
            (
                "cache-dominates",
                f"Half way through the answer a step reads {size(cache)} of cache and {size(weights)} of weights: smaller weights make "
                f"it at most {number((cache + weights) / cache)} times as fast; a smaller cache (8-bit, fewer KV heads) does more.",
            )
        )
    launch = decode["bound_seconds"]["launch"]
    if launch > 0.5 * decode["seconds"]:
        said.append(
            (
                "launch-bound",
                f"{percent(launch / decode['seconds'])} of a step are operators too small to outlast the start of their kernel: smaller "
                "weights will hardly make it faster, larger batches will.",
            )
        )
    routed = [operator for operator in linears if operator.experts]
    if routed and workload.batch > 1:
        touched = sum(operator.count * operator.touched(operator.rows(run)) for operator in routed)
        experts = sum(operator.count * operator.experts for operator in routed)
        said.append(
            (
                "experts-touched",
                f"A step of {workload.batch:,} tokens needs {percent(touched / experts)} of the experts, where one token needs "
                f"{percent(sum(operator.count * operator.active for operator in routed) / experts)}: it reads that much more.",
            )
        )
    crossover = data["test_time"]["crossover_tokens"] if data.get("test_time") else None
    if crossover and facts.context and crossover < facts.context and cache <= weights:
        said.append(
            (
                "long-answers",
                f"From {count(crossover)} tokens of context on, a step of batch {workload.batch:,} reads more cache than weights: "
                "compressing only weights helps long answers little.",
            )
        )
    return said
