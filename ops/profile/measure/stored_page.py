"""What people read of the stored form: where smaller is faster, and where it is slower."""

from __future__ import annotations

from tersor.formats.page import Notes, Section, Table
from tersor.formats.units import latency, number, size

SAME = 0.05  # a difference that counts for none
CHOSEN = "as loaded"


def section(data: dict) -> Section:
    """`data` is what `run.measure` returns, with `stored` in it."""
    kinds, whole = data["stored"]["kinds"], data["stored"]["whole"]
    items: list = [_kinds(kinds, data["device"]["dtype"])]
    if slower := slower_sentences(kinds):
        items.append(Notes(slower, warn=True))
    items.append(_whole(whole))
    return Section("The stored form", items, _lead(kinds, data["device"]["dtype"]))


def slower_sentences(kinds: list[dict]) -> list[str]:
    """One for each kind of layer that its stored form makes slower."""
    found = []
    for kind in kinds:
        slow = [entry for entry in kind["times"] if entry["speedup"] < 1 - SAME]
        if slow:
            times = " and ".join(f"{number(1 / entry['speedup'])}× for {_tokens(entry)}" for entry in slow)
            end = "it runs so all the same" if kind["runs_stored"] else "so load makes it dense"
            found.append(f"Smaller is slower here: {_named(kind)} takes {times} as long as dense; {end}.")
    return found


def _lead(kinds: list[dict], dtype: str) -> str:
    each = []
    for index, entry in enumerate(kinds[0]["times"]):
        dense = sum(kind["layers"] * kind["times"][index]["dense"]["seconds"] for kind in kinds)
        stored = sum(kind["layers"] * kind["times"][index]["stored"]["seconds"] for kind in kinds)
        ratio = dense / stored
        word = f"{number(max(ratio, 1 / ratio))}× as {'fast' if ratio > 1 else 'slow'}"
        each.append(f"{'as fast' if abs(ratio - 1) <= SAME else word} for {_tokens(entry)}")
    file = sum(kind["layers"] * kind["file_bytes"] for kind in kinds)
    dense = sum(kind["layers"] * kind["dense_bytes"] for kind in kinds)
    return (
        f"The layers that are not stored as plain matrices take {size(file)} in the file, {size(dense)} as {dtype} matrices; "
        f"run as they are stored, they are {' and '.join(each)}."
    )


def _tokens(entry: dict) -> str:
    return "1 token" if entry["tokens"] == 1 else f"{entry['tokens']:,} tokens"


def _named(kind: dict) -> str:
    out, columns = kind["shape"]
    return f"{kind['form']} {out:,} × {columns:,}"


def _kinds(kinds: list[dict], dtype: str) -> Table:
    rows = []
    for kind in kinds:
        for entry in kind["times"]:
            stored, dense = entry["stored"], entry["dense"]
            rows.append(
                [
                    kind["form"],
                    f"{kind['shape'][0]:,} × {kind['shape'][1]:,}",
                    str(kind["layers"]),
                    size(kind["file_bytes"]),
                    size(kind["dense_bytes"]),
                    f"{entry['tokens']:,}",
                    latency(stored["seconds"]),
                    f"{latency(stored['low_seconds'])} – {latency(stored['high_seconds'])}",
                    latency(dense["seconds"]),
                    f"{number(entry['speedup'], 2)}×",
                    "stored" if kind["runs_stored"] else "dense",
                ]
            )
    return Table(
        f"One linear layer: as it is stored, and as a {dtype} matrix",
        ["stored as", "shape", "layers", "in the file", "dense", "tokens", "stored takes", "quartiles", "dense takes", "speedup", "load runs it"],
        rows,
        numeric_from=2,
        note="Weights of the file, several layers in turn, so that they come from memory. Speedup: dense over stored.",
    )  # fmt: skip


def _whole(whole: dict) -> Table | Notes:
    if not whole["rows"]:
        return Notes([f"The whole model was not run: {whole['left_out_because']}."])
    rows = [
        [
            "as load chooses" if row["form"] == CHOSEN else f"every layer {row['form']}",
            "–" if row["tokens"] is None else f"{row['tokens']:,}",
            size(row["memory_bytes"]),
            latency(row["seconds"]),
            f"{latency(row['low_seconds'])} – {latency(row['high_seconds'])}",
            ", ".join(f"{count} {name}" for name, count in row["layers"].items()) or "dense only",
        ]
        for row in whole["rows"]
    ]
    return Table(
        "The whole model, its own weights",
        ["layers", "prompt of", "weights in memory", "takes", "quartiles", "kinds"],
        rows,
        note="tersor.ops.model.load gives the first; forms that come to the same are shown once.",
    )
