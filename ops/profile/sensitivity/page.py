"""What people read of a sensitivity analysis."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from math import prod
from statistics import median

from tersor.formats.page import Facts, Notes, Plot, Section, Table
from tersor.formats.units import count, number, percent, size
from tersor.ops.profile.sensitivity.candidates import ACTIVATIONS, KEEP, PRUNED

NATS = "nats per token"
SHOWN_PRUNED = ("50%", "2:4")
REFERENCES = ("w4a16-g128", "w4a16-g64", "w4a16-g32")  # the scheme that layers are compared under: what all can have
MOST_ROWS = 8
SHORT = re.compile(r"^.*?(\d+\..*?)(\.weight)?$")


def sections(data: dict) -> list[Section]:
    """Nothing where only statistics were collected."""
    if not data.get("tensors"):
        return [Section("Sensitivity", [Notes(data["warnings"], warn=True)])] if data.get("warnings") else []
    found = [_schemes(data), _layers(data)]
    if data["blocks"] and "lim" in data["blocks"][0]:
        found.append(_depth(data))
    if data["routing"]:
        found.append(_routing(data))
    if "suggestion" in data:
        found.append(_suggestion(data, data["suggestion"]))
    return found


def _short(name: str) -> str:
    """`model.layers.3.mlp.down_proj.weight` → `3.mlp.down_proj`."""
    found = SHORT.match(name)
    return found[1] if found else name


def _kind(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", "", _short(name).partition(".")[2])


def _factor(damage: float) -> str:
    """What an increase of the loss by so many nats does to perplexity."""
    return f"×{number(math.exp(damage), 3 if damage < 2 else 2)}" if damage < 20 else "lost"


def _damage_words(data: dict, damage: float) -> str:
    return _factor(damage) if data["damage_is"] == NATS else number(damage)


def _damage_title(data: dict) -> str:
    return "perplexity, predicted" if data["damage_is"] == NATS else data["damage_is"]


def _total(tensors: dict, label: str) -> float | None:
    rows = [numbers["schemes"].get(label) for numbers in tensors.values()]
    return None if any(row is None for row in rows) else sum(row["damage"] for row in rows)


def _is_shown(label: str) -> bool:
    """Two group sizes are enough to see what they do."""
    return label in SHOWN_PRUNED if label in PRUNED else not label.endswith("-g64")


def _schemes(data: dict) -> Section:
    tensors = data["tensors"]
    labels = [label for label in next(iter(tensors.values()))["schemes"] if _is_shown(label)]
    weights = sum(prod(numbers["shape"]) for numbers in tensors.values())
    rows, totals = [], {}
    for label in labels:
        total = _total(tensors, label)
        if total is None:
            continue
        totals[label] = total
        held = {name: numbers["schemes"][label] for name, numbers in tensors.items()}
        worst = max(held, key=lambda name: held[name]["damage"])
        decibels = [row["sqnr_db"] for row in held.values() if row["sqnr_db"] is not None]
        bits = 8 * sum(row["bytes"] for row in held.values()) / weights if "bytes" in held[worst] else None
        errors = [row["output_relative_mse"] for row in held.values() if "output_relative_mse" in row]
        rows.append(
            [
                f"wanda {label}" if label in PRUNED else label,
                "–" if bits is None else number(bits),
                f"{median(decibels):.1f}" if decibels else "–",
                percent(median(errors)) if errors else "–",
                _damage_words(data, total),
                f"{_short(worst)} ({percent(held[worst]['damage'] / total) if total else '–'})",
            ]
        )
    safe = [
        label
        for label in totals
        if totals[label] < 0.01 and data["damage_is"] == NATS and label not in (*PRUNED, *ACTIVATIONS)
    ]
    bits = {label: tensors[next(iter(tensors))]["schemes"][label]["bits"] for label in safe}
    least = min(bits, key=bits.get, default=None)
    lead = (
        f"{least} is the smallest scheme that should leave perplexity within 1 % when all layers get it."
        if least
        else "Predicted for every layer under the same scheme, rounded to nearest."
    )
    note = "bits with scales; medians over layers; the last column has the layer that suffers most, and its share of the damage"
    if data["damage_is"] == NATS:
        note += "; perplexity from the Fisher information, which small damages agree with and large ones (above ×1.5) exceed"
    note += "; what w8a8 and fp8 do to activations is not in it"
    columns = ["scheme", "bits", "SQNR dB", "output error", _damage_title(data), "worst layer"]
    warnings = [Notes(data["warnings"], warn=True)] if data["warnings"] else []
    return Section("What each scheme does to the model", [Table("", columns, rows, 1, note), *warnings], lead)


def _layers(data: dict) -> Section:
    """Which layers it is: by kind, the worst of all, and how it runs through depth."""
    tensors = data["tensors"]
    reference = next(label for label in REFERENCES if all(label in numbers["schemes"] for numbers in tensors.values()))
    damage = {name: numbers["schemes"][reference]["damage"] for name, numbers in tensors.items()}
    total = sum(damage.values()) or 1.0
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        kinds[_kind(name)].append(name)
    rows = []
    for kind, names in sorted(kinds.items(), key=lambda item: -sum(damage[name] for name in item[1])):
        share = sum(prod(tensors[name]["shape"]) for name in names)
        formats = Counter(tensors[name]["format_choice"] for name in names)
        outliers = [tensors[name].get("outliers") or {} for name in names]
        rows.append(
            [
                kind,
                percent(sum(damage[name] for name in names) / total),
                percent(share / sum(prod(numbers["shape"]) for numbers in tensors.values())),
                number(median(tensors[name]["kurtosis"] for name in names)),
                ", ".join(f"{format} {times}" for format, times in formats.most_common()),
                f"{max((found.get('max_to_median') or 0 for found in outliers), default=0):.0f}×",
                str(sum(found.get("above_6_medians") or 0 for found in outliers)),
            ]
        )
    worst = sorted(damage, key=damage.get, reverse=True)[:MOST_ROWS]
    worst_rows = [
        [
            _short(name),
            percent(damage[name] / total),
            number(tensors[name]["kurtosis"]),
            *(_format_cells(tensors[name])),
            _outlier_words(tensors[name].get("outliers")),
        ]
        for name in worst
    ]
    few = math.ceil(len(damage) / 10)
    top = sum(sorted(damage.values(), reverse=True)[:few]) / total
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name in tensors:
        if data["damage_is"] == NATS and damage[name] > 0 and "block" in tensors[name]:
            curves[_kind(name)].append((tensors[name]["block"], damage[name]))
    items = [
        Table(
            f"By kind of layer, under {reference}",
            [
                "layers",
                "of the damage",
                "of the weights",
                "kurtosis",
                "8-bit format",
                "largest input",
                "outlier inputs",
            ],
            rows,
            1,
            "kurtosis 3 is Gaussian; an outlier input has a norm above 6 times the median of its layer",
        ),
        Table(
            "The most sensitive layers",
            ["layer", "of the damage", "kurtosis", "INT8 dB", "E4M3 dB", "E5M2 dB", "outlier inputs"],
            worst_rows,
        ),
    ]
    if curves and len(curves) <= 8:
        items.append(
            Plot("Damage by depth", f"under {reference}", "block", data["damage_is"], curves=dict(curves), log_y=True)
        )
    lead = f"A tenth of the layers ({few}) takes {percent(top)} of the damage of {reference}; most of all {_short(worst[0])}."
    return Section("Which layers are sensitive", items, lead)


def _format_cells(numbers: dict) -> list[str]:
    values = numbers["formats_sqnr_db"]
    return ["–" if values[name] is None else f"{values[name]:.1f}" for name in ("INT8", "E4M3", "E5M2")]


def _outlier_words(found: dict | None) -> str:
    if not found or not found["above_6_medians"]:
        return "none"
    channels = ", ".join(map(str, found["channels"][:3]))
    return f"{found['above_6_medians']} ({channels}{' …' if found['above_6_medians'] > 3 else ''})"


def _depth(data: dict) -> Section:
    blocks = data["blocks"]
    kinds = sorted({branch["kind"] for block in blocks for branch in block["branches"]})
    rows = []
    for index, block in enumerate(blocks):
        by_kind = {branch["kind"]: branch for branch in block["branches"]}
        rows.append(
            [
                str(index),
                number(1 - block["cosine"]),
                *(number(by_kind[kind]["residual_contribution"]) if kind in by_kind else "–" for kind in kinds),
                *(number(1 - by_kind[kind]["cosine"]) if kind in by_kind else "–" for kind in kinds),
                f"{block['lim']:.3f}",
                percent(block["zd"]),
            ]
        )
    columns = ["block", "turns by"]
    columns += [f"{kind} adds" for kind in kinds] + [f"{kind} turns" for kind in kinds] + ["LIM", "ZD"]
    quiet = min(range(len(blocks)), key=lambda index: 1 - blocks[index]["cosine"])
    note = (
        "adds: norm of what is added to the norm of the stream; turns: 1 - cosine of the stream before and after. "
        "LIM = -cos(input, output), larger is more important; ZD = share of weights with z > 1, smaller is more important"
    )
    curves = {"block": [(index, max(1 - block["cosine"], 1e-9)) for index, block in enumerate(blocks)]}
    for kind in kinds:
        curves[kind] = [
            (index, max(1 - branch["cosine"], 1e-9))
            for index, block in enumerate(blocks)
            for branch in block["branches"]
            if branch["kind"] == kind
        ]
    plot = Plot("How far each block turns the stream", "1 - cosine", "block", "1 - cosine", curves=curves, log_y=True)
    lead = f"Block {quiet} changes the stream least (1 - cosine {number(1 - blocks[quiet]['cosine'])}): the first to try without."
    return Section("What depth does", [Table("", columns, rows, 1, note, folded=len(rows) > 12), plot], lead)


def _routing(data: dict) -> Section:
    rows = []
    for name, found in data["routing"].items():
        experts = len(found["counts"])
        rows.append(
            [
                _short(name),
                str(experts),
                f"{found['effective_experts']:.1f}",
                percent(found["busiest_share"]),
                str(found["unused"]),
                _likeliest(found),
            ]
        )
    columns = ["mixture", "experts", "in effect", "busiest", "unused", "likeliest step from the mixture before"]
    unused = sum(found["unused"] for found in data["routing"].values())
    lead = f"{unused} experts were never chosen on this text." if unused else "Every expert was chosen on this text."
    note = "in effect: exp of the entropy of the routing; a step's figure is how often it follows, against chance"
    return Section("Where experts are used", [Table("", columns, rows, 1, note, folded=len(rows) > 12)], lead)


def _likeliest(found: dict) -> str:
    """The pair of experts whose succession is furthest above what their frequencies explain."""
    table = found.get("transitions")
    if not table:
        return "–"
    total = sum(map(sum, table)) or 1
    rows, columns = [sum(row) for row in table], [sum(column) for column in zip(*table, strict=True)]
    lift, i, j = max(
        (
            ((value * total / (rows[i] * columns[j])) * math.sqrt(value), i, j)
            for i, row in enumerate(table)
            for j, value in enumerate(row)
            if value
        ),
        default=(0.0, 0, 0),
    )
    if not lift:
        return "–"
    return f"{i} → {j}: {percent(table[i][j] / rows[i])} against {percent(columns[j] / total)}"


def _suggestion(data: dict, found: dict) -> Section:
    labels = found["labels"]
    used = sorted(set(labels.values()), key=lambda label: (label == KEEP, label))
    kinds: dict[str, Counter] = defaultdict(Counter)
    for name, label in labels.items():
        kinds[_kind(name)][label] += 1
    rows = [[kind, *(str(times[label]) if times[label] else "" for label in used)] for kind, times in kinds.items()]
    facts = [
        ("budget", found["target"]),
        ("linear layers", f"{size(found['linear_bytes'])}, {number(found['bits_per_weight'], 4)} bits a weight"),
        ("checkpoint", size(found["checkpoint_bytes"])),
        (_damage_title(data), _damage_words(data, found["damage"])),
    ]
    uniform = found["uniform"]
    lead = f"{count(len(labels))} layers, {len(used)} schemes."
    if uniform:
        facts.append(
            (
                "the same for all",
                f"{uniform['label']}: {size(uniform['linear_bytes'])}, {_damage_words(data, uniform['damage'])}",
            )
        )
        if uniform["damage"] > 0:
            lead = (
                f"The mix should do {percent(1 - found['damage'] / uniform['damage'])} less damage than "
                f"{uniform['label']} for all layers, at no more bytes."
            )
    table = Table("Layers by scheme", ["layers", *used], rows, 1, "policy.json names every layer")
    return Section("Suggested mix", [Facts(facts), table], lead)
