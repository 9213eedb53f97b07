"""What people read of a profile from headers."""

from __future__ import annotations

from tersor.formats.page import Bars, Facts, Notes, Plot, Section, Table
from tersor.formats.units import count, latency, number, percent, size

NAMES = {"mlp": "MLP"}
LARGEST = 12  # rows of operators; the others together are one more


def sections(data: dict) -> list[Section]:
    """`data` is what `run.profile_headers` returns."""
    if data["model"] is None:
        return [_weights(data)]
    found = [_summary(data), _weights(data), _operators(data)]
    if data["kv_cache"]:
        found.append(_cache(data))
    found.append(_formats(data))
    if data["test_time"]:
        found.append(_answers(data))
    return found


def operations(flops: float) -> str:
    for power, unit in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**power:
            return f"{number(flops / 10**power)} {unit}FLOP"
    return f"{number(flops)} FLOP"


def dollars(amount: float | None) -> str:
    return "–" if amount is None else f"${number(amount)}"


def describe_model(data: dict) -> str:
    """The model in one line."""
    model = data["model"]
    parts = [f"{model['layers']} layers of {model['hidden']:,}"]
    if model["latent"]:
        parts.append(f"{model['heads']} heads, latent attention of {model['latent'][0]} + {model['latent'][1]}")
    elif model["heads"]:
        shared = "" if model["heads"] == model["kv_heads"] else f" on {model['kv_heads']} of keys"
        parts.append(f"{model['heads']} heads{shared}, {model['head_dim']} wide")
    kinds = model["attention_layers"]
    if "sliding" in kinds or "chunked" in kinds:
        windowed = kinds.get("sliding", 0) + kinds.get("chunked", 0)
        parts.append(f"window of {model['window_tokens']:,} in {windowed} layers")
    if model["experts"]:
        parts.append(f"{model['experts_per_token']} of {model['experts']} experts a token")
    if model["vocab"]:
        parts.append(f"vocabulary {model['vocab']:,}{' (tied)' if model['tied_head'] else ''}")
    return f"{model['architecture']}: {', '.join(parts)}"


def describe_workload(data: dict) -> str:
    workload, model = data["workload"], data["model"]
    if model["image_tokens"]:
        return f"batch {workload['batch']:,} of images of {model['image_tokens']:,} tokens"
    if data["serving"]["decode"] is None:
        return f"batch {workload['batch']:,} of {workload['prompt']:,} tokens"
    return f"batch {workload['batch']:,}, {workload['prompt']:,} tokens in, {workload['generate']:,} out"


def _devices(data: dict) -> str:
    hardware = data["hardware"]
    return hardware["name"] if hardware["devices"] == 1 else f"{hardware['devices']} × {hardware['name']}"


def _each(data: dict) -> str:
    batch = data["workload"]["batch"]
    return "" if batch == 1 else f" for each of {batch:,}"


def _dtypes(data: dict) -> str:
    total = data["stored_bytes"] or 1
    shown = [(label, entry["stored_bytes"] / total) for label, entry in data["dtypes"].items()]
    return ", ".join(label if share > 0.995 else f"{label} {percent(share)}" for label, share in shown if share > 0.005)


def _summary(data: dict) -> Section:
    serving, flops = data["serving"], data["flops"]
    active = data["model"]["active_params"]
    pairs = [
        ("Model", describe_model(data)),
        ("Parameters", f"{count(data['params'])}, of which a token is multiplied with {count(active)}"),
        (
            "Stored",
            f"{size(data['stored_bytes'])} in {data['files']:,} file{'s' if data['files'] > 1 else ''}: {_dtypes(data)}",
        ),
    ]
    if data["sparsity"]:
        zeros = data["sparsity"]["sparsity"]
        share = "" if zeros is None else f"{percent(zeros)}, "
        pairs.append(("Zeros declared", f"{share}{data['sparsity']['pattern']}"))
    work = f"prefill {operations(flops['prefill_flops_per_token'])}"
    if flops["decode_flops_per_token"]:
        work += f", decode {operations(flops['decode_flops_per_token'])}"
    pairs += [("Work per token", work), ("Workload", describe_workload(data)), ("Hardware", _devices(data))]
    speed = f"{number(serving['prompt_tokens_per_second'])} tokens/s"
    if serving["decode"] is None:
        pairs.append(("One pass", f"{latency(serving['first_token_seconds'])}, {speed}"))
        if serving["dollars_per_million_prompt_tokens"] is not None:
            pairs.append(("Per million tokens", dollars(serving["dollars_per_million_prompt_tokens"])))
        lead = f"One pass of {describe_workload(data)} takes {latency(serving['first_token_seconds'])} on {_devices(data)}, predicted."
    else:
        pairs += [
            ("First token after", f"{latency(serving['first_token_seconds'])}, {speed} of prompt"),
            (
                "Then a token every",
                f"{latency(serving['token_seconds'])}, {number(serving['decode_tokens_per_second'])} tokens/s in all",
            ),
            ("Whole answer", latency(serving["total_seconds"])),
        ]
        if serving["dollars_per_million_prompt_tokens"] is not None:
            read, written = (serving[f"dollars_per_million_{kind}_tokens"] for kind in ("prompt", "generated"))
            pairs.append(("Per million tokens", f"{dollars(read)} of prompt, {dollars(written)} generated"))
        bounds = serving["decode"]["bound_seconds"]
        cause = {
            "compute": "arithmetic",
            "memory": "memory bandwidth",
            "launch": "starting kernels",
            "link": "the links between devices",
        }
        lead = (
            f"{count(data['params'])} parameters in {size(data['stored_bytes'])}: on {_devices(data)} the first token is predicted after "
            f"{latency(serving['first_token_seconds'])}, then {number(1 / serving['token_seconds'])} tokens/s"
            f"{_each(data)}, held back by {cause[max(bounds, key=bounds.get)]}."
        )
    notes = [warning["message"] for warning in data["warnings"]]
    return Section("Model and speed", [Facts(pairs), *([Notes(notes, warn=True)] if notes else [])], lead)


def _weights(data: dict) -> Section:
    labels = list(data["dtypes"])
    rows = []
    for row in sorted(data["modules"], key=lambda row: -row["stored_bytes"]):
        share = percent(row["stored_bytes"] / (data["stored_bytes"] or 1))
        words = f"{size(row['stored_bytes'])} · {share} · {count(row['params'])} parameters"
        segments = [(label, float(row["by_dtype"].get(label, {}).get("stored_bytes", 0))) for label in labels]
        rows.append((NAMES.get(row["kind"], row["kind"]), words, segments))
    note = "By kind of module, as stored: codes with their scales."
    lead = f"{rows[0][1].split(' · ')[1]} of {size(data['stored_bytes'])} are {rows[0][0]}." if rows else ""
    items: list = [Bars("Bytes by kind of module", note, rows)]
    if data["model"] is None:
        items.append(Notes([warning["message"] for warning in data["warnings"]], warn=True))
    return Section("Where the bytes are", items, lead)


def _operators(data: dict) -> Section:
    serving, hardware = data["serving"], data["hardware"]
    phases = {phase: serving[phase] for phase in ("prefill", "decode") if serving[phase]}
    last = phases.get("decode") or phases["prefill"]
    merged = {phase: {row["name"]: row for row in _merged(run["operators"])} for phase, run in phases.items()}
    order = sorted(merged["decode" if "decode" in merged else "prefill"].values(), key=lambda row: -row["seconds"])
    columns = ["Operator", "Weights", "×"]
    for phase in phases:
        columns += [f"{phase} ms", "share", "FLOP/byte", "bound"]
    rows = []
    for entry in order[:LARGEST]:
        row = [entry["name"], _shape(entry), str(entry["count"])]
        for phase, run in phases.items():
            mine = merged[phase].get(entry["name"])
            row += _cells(mine, run["seconds"]) if mine else ["–"] * 4
        rows.append(row)
    rest = [entry["name"] for entry in order[LARGEST:]]
    if rest:
        row = [f"{len(rest)} others", "", ""]
        for phase, run in phases.items():
            seconds = sum(merged[phase][name]["seconds"] for name in rest if name in merged[phase])
            row += [number(1e3 * seconds), percent(seconds / run["seconds"]), "", ""]
        rows.append(row)
    note = (
        f"Predicted for {describe_workload(data)} on {_devices(data)}, at {percent(hardware['compute_efficiency'])} of its peak and "
        f"{percent(hardware['memory_efficiency'])} of its bandwidth, {number(1e6 * hardware['kernel_floor_seconds'])} µs to start a kernel."
        + (" Decode: the step half way through the answer." if "decode" in phases else "")
    )
    top = order[0]
    lead = (
        f"{'A step' if 'decode' in phases else 'A pass'} moves {size(last['moved_bytes'])} and computes {operations(last['flops'])}; "
        f"{top['name']} takes {percent(top['seconds'] / last['seconds'])} of it."
    )
    table = Table("Operators", columns, rows, 2, note)
    return Section("Where the time goes", [_answer(data, merged, order), _roofline(data, merged), table], lead)


def _answer(data: dict, merged: dict[str, dict[str, dict]], order: list[dict]) -> Bars:
    """What a whole answer spends in each operator: the prompt once, a step for each token after the first."""
    times = {"prefill": 1, "decode": data["workload"]["generate"] - 1}
    rows = []
    for entry in order[:LARGEST]:
        name = entry["name"]
        parts = [(phase, times[phase] * found[name]["seconds"]) for phase, found in merged.items() if name in found]
        rows.append((name, latency(sum(seconds for _, seconds in parts)), parts))
    rows.sort(key=lambda row: -sum(seconds for _, seconds in row[2]))
    return Bars("Time of a whole answer", f"{describe_workload(data)}, predicted.", rows)


def _merged(rows: list[dict]) -> list[dict]:
    """Operators of the same name as one row: the shapes of a model's layers may differ, its names tell them well enough."""
    found: dict[str, dict] = {}
    for row in rows:
        known = found.setdefault(
            row["name"], {**row, "count": 0, "flops": 0.0, "moved_bytes": 0.0, "seconds": 0.0, "longest": 0.0}
        )
        for key in ("count", "flops", "moved_bytes", "seconds"):
            known[key] += row[key]
        if row["seconds"] > known["longest"]:
            known |= {"longest": row["seconds"], "bound": row["bound"]}
        if known["shape"] != row["shape"]:
            known["shape"] = None
    for row in found.values():
        row["flops_per_byte"] = row["flops"] / row["moved_bytes"] if row["moved_bytes"] else 0.0
    return list(found.values())


def _shape(row: dict) -> str:
    if row["dtype"] is None:
        return ""
    extents = "" if row["shape"] is None else f"{'×'.join(f'{extent:,}' for extent in row['shape'])} "
    return f"{extents}{row['dtype']}"


def _cells(row: dict, total: float) -> list[str]:
    return [
        number(1e3 * row["seconds"]), percent(row["seconds"] / total), number(row["flops_per_byte"]), row["bound"],
    ]  # fmt: skip


def _roofline(data: dict, merged: dict[str, dict[str, dict]]) -> Plot:
    hardware = data["hardware"]
    bandwidth = hardware["memory_gbps"] * 1e9 * hardware["devices"]
    points = {
        phase: [
            (row["flops_per_byte"], row["flops"] / row["seconds"], f"{name}, {latency(row['seconds'])}")
            for name, row in rows.items()
            if row["flops"] > 0
        ]
        for phase, rows in merged.items()
    }
    seen = [x for dots in points.values() for x, _, _ in dots]
    left, right = min([*seen, 1.0]) / 2, max([*seen, 1000.0]) * 2
    used = {row["precision"] for rows in merged.values() for row in rows.values() if row["flops"] > 0}
    curves = {}
    for precision in sorted(used):
        peak = hardware["peak_flops"][precision] * hardware["devices"]
        ridge = peak / bandwidth
        curves[f"{precision} peak"] = [(left, left * bandwidth), (ridge, peak), (max(right, 2 * ridge), peak)]
    note = f"Lines: what {_devices(data)} could do at best. Dots: operators at their predicted speed. Left of the bend memory is the limit."
    return Plot(
        "Roofline", note, "FLOP per byte", "FLOP/s", curves, points, log_x=True, log_y=True, unit_x="number", unit_y="count"
    )  # fmt: skip


def _cache(data: dict) -> Section:
    cache = data["kv_cache"]
    rows = [
        [
            row["kind"],
            str(row["layers"]),
            f"latent {row['latent'][0]} + {row['latent'][1]}" if row["latent"] else f"{row['kv_heads']}",
            size(row["bytes_per_token"]),
            "all" if row["window_tokens"] is None else f"{row['window_tokens']:,}",
        ]
        for row in cache["layers"]
    ]
    longest, trained = cache["longest_context_tokens"], cache["trained_context_tokens"]
    if longest is None:
        fits = "any length fits"
    elif longest == 0:
        fits = "no context fits next to the weights"
    else:
        fits = f"{longest:,} tokens fit" + (
            f" (config.json allows {trained:,})" if trained and trained < longest else ""
        )
    pairs = [
        ("Per token", f"{size(cache['bytes_per_token'])}, {8 * cache['bytes_per_number']} bits a number"),
        ("This workload", size(cache["workload_bytes"])),
        (
            "Longest context",
            f"{fits}{_each(data)}, in {percent(cache['usable_share'])} of the memory",
        ),
    ]
    if cache["bytes_per_token_past_windows"] != cache["bytes_per_token"]:
        pairs.insert(1, ("Past the windows", f"{size(cache['bytes_per_token_past_windows'])} per token"))
    columns = ["Attention", "Layers", "KV heads", "Per token", "Tokens kept"]
    lead = f"A token of context takes {size(cache['bytes_per_token'])}; on {_devices(data)} {fits}{_each(data)}."
    items: list = [Facts(pairs)]
    if len(rows) > 1 or cache["layers"][0]["latent"]:
        items.append(Table("Cache by kind of layer", columns, rows))
    return Section("Context", items, lead)


def _formats(data: dict) -> Section:
    rows = data["formats"]
    decodes = "decode_seconds" in rows[0]
    columns = ["Format", "Size", "prefill ms", "× bf16"]
    columns += ["decode ms", "× bf16", "slower than bf16 from batch"] if decodes else []
    cells = []
    for row in rows:
        cell = [
            row["format"],
            size(row["stored_bytes"]),
            number(1e3 * row["prefill_seconds"]),
            _speed(row["prefill_speedup"]),
        ]
        if decodes:
            batch = row["slower_from_batch"]
            cell += [
                number(1e3 * row["decode_seconds"]),
                _speed(row["decode_speedup"]),
                "never" if batch is None else f"{batch:,}",
            ]
        cells.append(cell)
    notes = [f"{row['format']}: {row['note']}" for row in rows if row["note"]]
    notes += [f"{row['format']}: not native on {data['hardware']['name']}" for row in rows if not row["native"]]
    phase = "decode" if decodes else "prefill"
    best = max(rows, key=lambda row: row[f"{phase}_speedup"])
    lead = f"Fastest {phase} at batch {data['workload']['batch']:,}: {best['format']}, {_speed(best[f'{phase}_speedup'])} the speed of bf16."
    note = (
        "Predicted, for the linear layers of the blocks; the head, embeddings, norms and the cache stay. "
        + "; ".join(notes)
        + "."
    )
    return Section("Other formats", [Table("Formats", columns, cells, 1, note)], lead)


def _speed(factor: float) -> str:
    return f"{number(factor, 2)}×"


def _answers(data: dict) -> Section:
    test_time = data["test_time"]
    rows = [
        [
            f"{row['generated_tokens']:,}", f"{row['trials']:,}", operations(row["equivalent_flops"]), percent(row["attention_share"]),
            percent(row["share_left_with_quarter_weights"]), percent(row["share_left_with_half_cache"]),
        ]
        for row in test_time["rows"]
    ]  # fmt: skip
    columns = ["Tokens", "Answers", "Cost", "of that attention", "with weights in 4 bits", "with cache in 8 bits"]
    note = (
        f"Equivalent FLOPs of the answers to one prompt of {test_time['prompt_tokens']:,} tokens (Kinetics): arithmetic, and "
        f"{number(test_time['flops_per_byte'])} FLOP for each byte of cache and weights read, the weights shared by batch {test_time['batch']:,}. "
        "The last two columns are what is left of that."
    )
    tokens = test_time["crossover_tokens"]
    lead = (
        "Its cache stops growing, so that weights stay the larger part."
        if tokens is None
        else f"From {count(tokens)} tokens of context on a step reads more cache than weights."
    )
    return Section("Long and many answers", [Table("Cost of answers", columns, rows, 0, note)], lead)
