"""What people read of `--measure`."""

from __future__ import annotations

from tersor.formats.page import Facts, Notes, Plot, Section, Table
from tersor.formats.units import latency, number, percent, size
from tersor.ops.profile.measure import stored_page
from tersor.ops.profile.measure.chains import WAYS, best_bytes

SMALL_SHARE = 0.01  # of the time: such operators share a row
LEAST_SAVING = 0.01  # of what a block keeps: chains that save less are not shown


def sections(data: dict) -> list[Section]:
    """`data` is what `run.measure` returns."""
    stored = [stored_page.section(data)] if data.get("stored") else []
    return [_speed(data), _operators(data), *stored, _memory(data)]


def _operations(flops: float) -> str:
    return f"{number(flops / 1e12)} TFLOP" if flops >= 1e12 else f"{number(flops / 1e9)} GFLOP"


def _between(entry: dict) -> str:
    low, high = entry["interval_seconds"]
    return f"{latency(entry['seconds'])} ({latency(low)} to {latency(high)})"


def _machine(data: dict) -> str:
    device = data["device"]
    threads = f", {device['threads']} thread{'s' if device['threads'] > 1 else ''}" if device["threads"] else ""
    return f"{device['name']}{threads}, {device['dtype']}, torch {device['torch']}"


def _speed(data: dict) -> Section:
    runtime, host, workload = data["runtime"], data["host"], data["workload"]
    each = "" if workload["batch"] == 1 else f"batch {workload['batch']:,}, "
    out = f", {runtime['generate']:,} out" if runtime["generate"] else ""
    peaks = ", ".join(f"{name} {_operations(peak)}/s" for name, peak in host["peak_flops"].items())
    copied = f", {number(host['copy_gbps'])} GB/s copying" if host["copy_gbps"] else ""
    pairs = [
        ("Device", _machine(data)),
        ("Matmul reaches", peaks),
        ("Memory reaches", f"{number(host['memory_gbps'])} GB/s reading{copied}"),
        ("Workload", f"{each}{runtime['prompt']:,} tokens in{out}"),
        ("First token after" if runtime["token"] else "One pass", _between(runtime["first_token"])),
    ]
    if runtime["token"]:
        pairs += [
            ("Then a token every", _between(runtime["token"])),
            ("Whole answer", _between(runtime["total"])),
        ]
    unit = "core-seconds" if data["device"]["threads"] else "GPU-seconds"
    pairs.append(("Takes", f"{number(runtime['device_seconds'])} {unit}"))
    items = [
        Facts(pairs),
        Notes(
            [
                f"Times are medians of {runtime['rounds']} rounds; in brackets is where the next run lies with 95 %, if the "
                "machine goes on as it was. Weights are made up in the shapes of the config: dense, whatever is stored."
            ]
        ),
        _check(data),
        Plot(
            "Time of a prompt",
            "Measured block by block, times the number of blocks.",
            "prompt tokens",
            "seconds",
            curves={"predicted": list(zip(runtime["sizes"], runtime["prompt_seconds"], strict=True))},
            points=_prompt_points(data),
            unit_x="count",
            unit_y="duration",
        ),
    ]
    return Section("Measured speed", items, _lead(data))


def _prompt_points(data: dict) -> dict:
    rows = [row for row in data["held_out"]["rows"] if row["generate"] == 0 and row["measured_seconds"]]
    dots = [(row["prompt"], row["measured_seconds"], f"{row['prompt']} tokens, whole model") for row in rows]
    return {"whole model": dots} if dots else {}


def _lead(data: dict) -> str:
    runtime, held_out = data["runtime"], data["held_out"]
    speed = f"{number(runtime['prompt_tokens_per_second'])} tokens/s of prompt"
    if runtime["token"]:
        speed += f", {number(runtime['decode_tokens_per_second'])} tokens/s generated"
    trust = "the whole model was not run against it"
    if held_out["largest_error"] is not None:
        trust = f"at prompts and answers not used in the fit it is off by at most {percent(held_out['largest_error'])}"
    return f"On this device {speed}; put together from single blocks, {trust}."


def _check(data: dict) -> Table | Notes:
    held_out = data["held_out"]
    if not held_out["rows"]:
        return Notes([f"Not checked against the whole model: {held_out['left_out_because']}."])
    rows = []
    for row in held_out["rows"]:
        low, high = row["interval_seconds"]
        measured = row["measured_seconds"]
        rows.append(
            [
                f"{row['prompt']:,} in" + (f", {row['generate']:,} out" if row["generate"] else ""),
                latency(row["predicted_seconds"]),
                f"{latency(low)} – {latency(high)}",
                latency(measured) if measured else "–",
                f"{100 * row['error']:+.1f} %" if measured else "–",
                str(row["runs"]),
            ]
        )
    return Table(
        "Predicted against the whole model, at sizes the fit has not seen",
        ["tokens", "predicted", "95 %", "measured", "error", "runs"],
        rows,
    )


def _operators(data: dict) -> Section:
    found = data["operators"]
    items: list = [_block_table(data["blocks"])]
    for what, title in (("prompt", "Reading a prompt of {:,} tokens"), ("step", "One more token after {:,}")):
        if found[what]:
            items.append(_operator_table(found[what], title.format(found[what]["tokens"])))
    missing = found["roofline_missing_because"]
    items.append(
        Notes(
            [
                f"No roofline: {missing}."
                if missing
                else "Roofline: the longer of arithmetic and memory traffic at what this machine reaches, and what starting an operator takes."
            ]
        )
    )
    top = max(found["prompt"]["rows"], key=lambda row: row["total_seconds"])
    lead = (
        f"{top['name']} is the largest part of a prompt, {percent(top['total_seconds'] / found['prompt']['seconds'])}"
    )
    if found["step"]:
        top = max(found["step"]["rows"], key=lambda row: row["total_seconds"])
        lead += f"; of a step it is {top['name']}, {percent(top['total_seconds'] / found['step']['seconds'])}"
    return Section("Where the time goes", items, lead + ".")


def _block_table(blocks: list[dict]) -> Table:
    rows = []
    for block in blocks:
        cells = [block["kind"], str(block["layers"])]
        for what in ("prompt", "step"):
            last = block[what][-1] if block.get(what) else None
            cells += (
                [
                    f"{last['tokens']:,}",
                    latency(last["seconds"]),
                    f"{latency(last['low_seconds'])} – {latency(last['high_seconds'])}",
                ]
                if last
                else ["–"] * 3
            )
        rows.append(cells)
    return Table(
        "One block",
        ["kind", "blocks", "prompt of", "takes", "quartiles", "step after", "takes", "quartiles"],
        rows,
    )


def _operator_table(found: dict, title: str) -> Table:
    total = found["seconds"]
    rows, small = [], []
    for row in sorted(found["rows"], key=lambda row: -row["total_seconds"]):
        if row["total_seconds"] < SMALL_SHARE * total:
            small.append(row)
            continue
        rows.append(
            [
                row["name"],
                str(row["count"]),
                latency(row["seconds"]),
                f"{latency(row['low_seconds'])} – {latency(row['high_seconds'])}",
                latency(row["total_seconds"]),
                percent(row["total_seconds"] / total),
                *_against(row["total_seconds"], row.get("predicted_seconds")),
            ]
        )
    if small:
        together = sum(row["total_seconds"] for row in small)
        rows.append(
            [
                f"{len(small)} other{'s' if len(small) > 1 else ''}",
                "",
                "",
                "",
                latency(together),
                percent(together / total),
                "–",
                "–",
            ]
        )
    rows.append(["together", "", "", "", latency(total), "", *_against(total, found.get("predicted_seconds"))])
    return Table(
        title,
        ["operator", "blocks", "one", "quartiles", "all", "share", "roofline", "times roofline"],
        rows,
    )


def _against(seconds: float, predicted: float | None) -> list[str]:
    return ["–", "–"] if not predicted else [latency(predicted), f"{number(seconds / predicted, 2)}×"]


def _memory(data: dict) -> Section:
    found, chains = data["activations"], data["chains"]
    tokens, batch = found["tokens"], found["batch"]
    rows = []
    for attention, kinds in found["kinds"].items():
        for kind, entry in kinds.items():
            squared = entry["squared_bytes"]
            rows.append(
                [
                    kind,
                    attention,
                    str(len(entry["layers"])),
                    size(entry["saved_bytes"]),
                    size(squared) if squared else "none",
                    size(len(entry["layers"]) * entry["saved_bytes"]),
                    size(len(entry["layers"]) * entry["input_bytes"]),
                ]
            )
    first = next(iter(found["kinds"].values()))
    every = sum(len(entry["layers"]) * entry["saved_bytes"] for entry in first.values())
    of = f"{tokens:,} tokens" if batch == 1 else f"{batch:,} × {tokens:,} tokens"
    items = [
        Table(
            f"Kept for the backward pass of {of}, {found['dtype']}",
            ["block", "attention", "blocks", "each keeps", "of it ∝ tokens²", "all keep", "all, recomputed"],
            rows,
            numeric_from=2,
            note="Counted by running one block of each kind. Recomputed: only the input of each block is kept.",
        )
    ]
    unfused = [kind for kind, entry in found["kinds"].get("sdpa", {}).items() if entry["squared_bytes"]]
    if unfused:
        items.append(
            Notes(
                [
                    f"{', '.join(unfused)}: sdpa keeps something that grows with tokens² too, a mask, or scores where no "
                    "fused kernel of the CPU fits; a GPU may keep less."
                ],
                warn=True,
            )
        )
    shown = _chain_rows(chains, first, tokens * batch)
    lead = f"The blocks keep {size(every)} for the backward pass of {of}"
    if shown:
        items.append(
            Table(
                "Element-wise chains that could keep less, bytes per token",
                [
                    "chain",
                    "block",
                    "in each",
                    "width",
                    "keeps",
                    "nested",
                    "recompute",
                    "and output",
                    "invert",
                    "all save",
                ],
                [row for _, row in shown],
                numeric_from=2,
                note="Nested forward-mode derivatives; recomputing the chain from its inputs, or with it what the next operator "
                "reads; functions differentiated from their output. All save: by the best of these, in all blocks.",
            )
        )
        lead += f"; {shown[0][1][0]} could keep {size(shown[0][0])} less"
    return Section("What training keeps in memory", items, lead + ".")


def _named(chain: str) -> str:
    """With the name that people know it by."""
    if "rsqrt" in chain:
        return "RMSNorm"
    if chain == "silu → ×":
        return "SwiGLU"
    return "GELU by tanh" if "pow" in chain and "tanh" in chain else chain


def _chain_rows(chains: list[dict], kinds: dict, tokens: int) -> list[tuple[float, list[str]]]:
    """(bytes saved in all blocks, cells), the largest saving first."""
    rows = []
    for chain in chains:
        saving = chain["count"] * (chain["kept_bytes"] - best_bytes(chain))
        if saving < LEAST_SAVING * kinds[chain["kind"]]["per_token_bytes"]:
            continue
        everywhere = chain["layers"] * tokens * saving
        ways = [size(chain[way]) if chain[way] is not None else "–" for way in WAYS]
        cells = [
            _named(chain["chain"]), chain["kind"], f"{chain['count']}×", f"{chain['width']:,}", size(chain["kept_bytes"]), *ways,
            size(everywhere),
        ]  # fmt: skip
        rows.append((everywhere, cells))
    return sorted(rows, key=lambda row: -row[0])
