"""What people read of `--sparse-crossover`."""

from __future__ import annotations

from tersor.formats.page import Notes, Section, Table
from tersor.formats.units import latency, number, percent
from tersor.ops.model.sparse_samples import label
from tersor.ops.model.tile_costs import SPARSITIES

SHOWN = (0.5, 0.8, 0.9, 0.95)  # sparsities whose times are listed
NEVER = "never"


def sections(data: dict) -> list[Section]:
    """`data` is what `run.sparse_crossover` returns."""
    kinds = list(dict.fromkeys(label(_kind(entry)) for row in data["rows"] for entry in row["formats"]))
    threads = f", {data['threads']} thread{'s' if data['threads'] > 1 else ''}" if data["threads"] else ""
    where = f"{data['device']}{threads}, {data['dtype']}"
    return [
        Section(
            "Where sparse products pay",
            [
                Table(
                    "Sparsity above which each format is faster than the dense product",
                    ["weight", "layers", "tokens", "dense", *kinds],
                    [_summary(row, kinds) for row in data["rows"]],
                    note=f"Measured on this device: {where}. Of tile formats (vector, block) it is the share of tiles that are "
                    "empty; of 2:4 weights (sparse-24-bitmask) the speed against dense.",
                ),
                Notes(
                    [
                        "Zeros that are spread at random leave few tiles empty: at 90 %, 3 % of 32x1 tiles. What a tensor's own "
                        "zeros gain is told by sparsify."
                    ]
                ),
                Table(
                    "Time of a product by sparsity",
                    ["weight", "tokens", "format", "above", *(percent(share) for share in SHOWN), "dense"],
                    [_times(row, entry) for row in data["rows"] for entry in row["formats"]],
                    numeric_from=3,
                    folded=True,
                ),
            ],
            _lead(data),
        )
    ]


def _kind(entry: dict) -> tuple:
    return entry["format"], entry["tile"]


def _weight(row: dict) -> str:
    return "{:,}×{:,}".format(*row["shape"])


def _above(entry: dict, dense: float) -> str:
    """`83 %`, `≤ 50 %` where it was faster wherever it was measured, or never."""
    start = entry["faster_from"]
    if len(entry["seconds"]) == 1:
        return f"{number(dense / entry['seconds'][0], 2)}×" if start is not None else NEVER
    if start is None:
        return NEVER
    return f"≤ {100 * start:.0f} %" if start <= entry["sparsities"][0] else f"{100 * start:.0f} %"


def _summary(row: dict, kinds: list[str]) -> list[str]:
    found = {label(_kind(entry)): _above(entry, row["dense_seconds"]) for entry in row["formats"]}
    cells = [_weight(row), f"{row['layers']:,}", f"{row['tokens']:,}", latency(row["dense_seconds"])]
    return cells + [found.get(kind, "–") for kind in kinds]


def _times(row: dict, entry: dict) -> list[str]:
    times = dict(zip(SPARSITIES, entry["seconds"], strict=False))  # 2:4 has the first alone
    cells = [_weight(row), f"{row['tokens']:,}", label(_kind(entry)), _above(entry, row["dense_seconds"])]
    cells += [latency(times[share]) if share in times else "–" for share in SHOWN]
    return [*cells, latency(row["dense_seconds"])]


def _lead(data: dict) -> str:
    """The format that pays from the lowest sparsity on, for few tokens and for many."""
    found = []
    for tokens in data["tokens"]:
        rows = [row for row in data["rows"] if row["tokens"] == tokens]
        starts: dict[str, list[float]] = {}
        for row in rows:
            for entry in row["formats"]:
                if entry["faster_from"] is not None and len(entry["seconds"]) > 1:
                    starts.setdefault(label(_kind(entry)), []).append(entry["faster_from"])
        everywhere = {kind: max(values) for kind, values in starts.items() if len(values) == len(rows)}
        of = f"{tokens:,} token{'s' if tokens > 1 else ''}"
        if everywhere:
            kind = min(everywhere, key=everywhere.get)
            found.append(f"with {of} {kind} is faster than dense above {100 * everywhere[kind]:.0f} % at every shape")
        else:
            found.append(f"with {of} " + ("it depends on the shape" if starts else "dense is always faster"))
    text = "; ".join(found)
    return f"{text[0].upper()}{text[1:]}."
