"""`report.html`: the report for people, one page that loads nothing and runs without scripts.

Made from the content of `report.json` alone, for every command: a section is there when its data is. All text goes
through `svg.escape`, and a content security policy lets the browser run nothing but the stylesheet and the script below.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tersor.formats import svg, svg_plots, units
from tersor.formats.svg import escape, small
from tersor.formats.units import count, duration, finite, number, percent, ratio, size

# What `error` of a tensor may hold, the most telling first. sqnr_db is relative_mse once more, in decibels.
ERRORS = {
    "output_relative_mse": ("Error of the outputs", "Squared error of a layer's output on the calibration text, as a share of the output squared."),
    "relative_mse": ("Error of the weights", "Squared error of the stored weights, as a share of the weights squared."),
    "output_relative_mse_without_repair": ("Error of the outputs without repair", "The same, had the layer that reads what is left not been refitted."),
}  # fmt: skip
SAME_ERROR = {"sqnr_db"}
NEGATIONS = {"symmetric": "--asymmetric", "clip": "--no-clip", "activation_order": "--no-activation-order", "keep_zeros": "--no-keep-zeros", "repair": "--no-repair", "permute": "--no-permute", "nested": "--no-nested"}  # fmt: skip
TILES = {"perplexity", "compared_perplexity", "kl_divergence", "top1_agreement"}
MOST_GROUPS = 15  # rows of the tables that are open at once
MOST_ROWS = 20_000  # rows of the folded table; browsers grow slow beyond
INDEX = re.compile(r"[0-9]{1,6}")


class Row(NamedTuple):
    """A tensor entry of the report, the kind of module it belongs to, and the layer it is in."""

    name: str
    kind: str
    layer: int | None
    action: str
    reason: str
    source: str  # dtype before
    dtype: str
    shape: str
    params: int
    before: int  # bytes
    after: int
    error: dict
    sparsity: float | None
    bits: float | None


def render(content: dict) -> str:
    """The page of a report (`Report.to_dict()`). The same content gives the same page."""
    rows = locate_tensors(content["tensors"])
    sections = (
        hero(content, rows), svg.warnings(content["warnings"]), history(content), quality(content["quality"]), training(content["quality"]),
        bytes_by_kind(rows), kept(rows), changed(rows), by_layer(rows), every_tensor(rows), provenance(content),
    )  # fmt: skip
    return svg.page(_headline(content), "".join(sections), svg.SCRIPT)


def locate_tensors(entries: list[dict]) -> list[Row]:
    """Split names at their first number: `model.layers.3.self_attn.q_proj.weight` is a `self_attn.q_proj` of layer 3.

    Further numbers, those of experts, are dropped. Stacks that share a kind (encoder and decoder) are told apart.
    """
    places = [_place(entry["name"]) for entry in entries]
    stacks = defaultdict(set)
    for stack, kind, _ in places:
        stacks[kind].add(stack)
    rows = []
    for entry, (stack, kind, layer) in zip(entries, places, strict=True):
        kind = f"{stack} {kind}" if stack and len(stacks[kind]) > 1 else kind
        before, after = entry["before"], entry["after"]
        shape = "×".join(map(str, after["shape"])) or "scalar"
        error = {name: value for name, value in (entry["error"] or {}).items() if finite(value) is not None}
        rows.append(
            Row(
                entry["name"], kind, layer, entry["action"], entry["reason"] or "", before["dtype"], after["dtype"], shape,
                math.prod(after["shape"]), before["bytes"], after["bytes"], error, entry["sparsity"], entry["bits"],
            )
        )  # fmt: skip
    return rows


def _place(name: str) -> tuple[str, str, int | None]:
    """Stack, kind of module, layer."""
    parts = name.split(".")
    parts = parts[:-1] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts
    parts = parts[1:] if len(parts) > 1 and parts[0] == "model" else parts
    at = next((index for index, part in enumerate(parts) if index and INDEX.fullmatch(part)), None)
    if at is None:
        return "", ".".join(parts), None
    kind = ".".join(part for part in parts[at + 1 :] if not INDEX.fullmatch(part))
    return ".".join(parts[:at]), kind or parts[at - 1], int(parts[at])


# ---------------------------------------------------------------- sections


def hero(content: dict, rows: list[Row]) -> str:
    """One sentence, and the numbers in tiles."""
    totals, past, (before, after) = content["totals"], content["history"], _bytes(content)
    tiles = []
    if before and after:
        tiles.append(("Size", size(after), f"{size(before)} before, {ratio(before, after)}"))
    if totals.get("bits_per_weight"):
        params = sum(row.params for row in _changed(rows))
        inner = f"{number(8 * _sum(_changed(rows), 'after') / params)} in what was changed" if params else "with scales"
        tiles.append(("Bits per weight", number(totals["bits_per_weight"]), inner))
    first, last = totals.get("params_before"), totals.get("params_after")
    if last:
        tiles.append(("Parameters", count(last), "unchanged" if first == last else f"{count(first)} before"))
    if (totals.get("sparsity") or 0) >= 0.005:
        tiles.append(("Zeros", percent(totals["sparsity"]), "of the weights measured"))
    tiles += _quality_tiles(content["quality"])
    tiles.append(("Time", duration(content["seconds"]), f"on {content['device']}"))
    if content["peak_rss_bytes"]:
        tiles.append(("Peak memory", size(content["peak_rss_bytes"]), "resident set of the process"))
    if origin := finite(_get(past[0], "input", "bytes")) if past and after else None:
        whole = f"{size(origin)} → {size(after)}, {ratio(origin, after)}"
        tiles.append(("Whole pipeline", f"{len(past) + 1} steps", whole))
    return svg.header(f"tersor {content['command']}", _headline(content), tiles)


def _quality_tiles(found: dict) -> list[tuple[str, object, str]]:
    tiles, dense = [], finite(found.get("compared_perplexity"))
    if "perplexity" in found:
        value = finite(found["perplexity"])
        change = f" ({100 * (value / dense - 1):+.1f} %)" if value and dense else ""
        detail = f"{number(dense, 4)} for {_stem(found.get('compared_with'))}{change}" if dense else "lower is better"
        tiles.append(("Perplexity", "not finite" if value is None else number(value, 4), detail))
    if (divergence := finite(found.get("kl_divergence"))) is not None:
        tiles.append(("KL divergence", number(divergence), "nats per token; 0 is identical"))
    if (agreement := finite(found.get("top1_agreement"))) is not None:
        tiles.append(("Top-1 agreement", percent(agreement), "of tokens predicted alike"))
    return tiles


def history(content: dict) -> str:
    """Every step from the first checkpoint to this one."""
    items = []
    for step in [*content["history"], content]:
        before, after, seconds, bits, perplexity = (
            finite(_get(step, *keys))
            for keys in (("input", "bytes"), ("output", "bytes"), ("seconds",), ("totals", "bits_per_weight"), ("quality", "perplexity"))
        )  # fmt: skip
        notes = [
            f"{size(before)} → {size(after)}" if before and after else "",
            f"{number(bits)} bits per weight" if bits else "",
            f"perplexity {number(perplexity, 4)}" if perplexity else "",
            duration(seconds) if seconds else "",
        ]
        heard = _get(step, "warnings") if step is not content else None
        items.append(
            f"<li><b>{escape(_get(step, 'command') or '?')}</b> {escape(_stem(_get(step, 'input', 'path')))} → "
            f"{escape(_stem(_get(step, 'output', 'path')))}{small(' · '.join(filter(None, notes)))}"
            f"{svg.command(command_line(step))}{svg.listing(heard if isinstance(heard, list) else [])}</li>"
        )
    body = f'<ol class="steps">{"".join(items)}</ol>' if content["history"] else ""
    return svg.section("How this checkpoint came about", body)


def quality(found: dict) -> str:
    """On which text the tiles' numbers were measured, and whatever else was."""
    told = [(key, value) for key, value in svg.flat(found) if key not in TILES and value not in (None, [])]
    pairs = [svg.keyed(key, f"{len(value)} in report.json" if _is_table(value) else value) for key, value in told]
    more = f"<p>{len(pairs) - 40:,} more in report.json.</p>" if len(pairs) > 40 else ""
    return svg.section("Quality", svg.facts(pairs[:40]) + more)


def training(found: dict) -> str:
    """The loss curve of distill."""
    curve = _get(found, "training", "curve")
    if not isinstance(curve, list):
        return ""
    text = "Mean over the tokens of each step, all terms with their weights."
    points = [("loss", line["step"], line["loss"]) for line in curve]
    return svg.section("Training", svg_plots.lines("loss", "Loss", text, points, "number", "step"))


def _is_table(value: object) -> bool:
    return isinstance(value, list) and isinstance(value[0], dict)


def bytes_by_kind(rows: list[Row]) -> str:
    groups = _grouped(rows, lambda row: row.kind)
    whole = max(_sum(rows, "before"), _sum(rows, "after"))
    if not whole:
        return ""
    large = [kind for kind, members in groups if _sum(members, "before") + _sum(members, "after") >= 0.005 * whole][:11]
    rest = [row for row in rows if row.kind not in set(large)]
    shown = [(kind, members) for kind, members in groups if kind in large]
    shown += [(f"{len(groups) - len(large)} other kinds", rest)] if rest else []
    bars = []
    for kind, members in shown:
        before, after = _sum(members, "before"), _sum(members, "after")
        value = size(after) if before == after else f"{size(before)} → {size(after)}"
        label = svg.shorten(kind, 26) + (f" ×{len(members):,}" if len(members) > 1 else "")
        bars.append(svg.Bar(label, value, [[("before", before)], [("after" if _changed(members) else "kept", after)]]))
    legend = {"before": "before", "after": "after", "kept": "after, kept as it was"}
    chart = svg.bars("bytes", "Bytes by kind of module", "All layers together.", bars, legend)
    return svg.section("Where the bytes are", chart)


def kept(rows: list[Row]) -> str:
    """What was not compressed and why, a line per kind of module."""
    still = [row for row in rows if row.action == "keep"]
    groups = _grouped(still, lambda row: (row.kind, row.reason))
    whole, after, body = _sum(rows, "after") or 1, _sum(still, "after"), ""
    for (kind, reason), members in groups[:MOST_GROUPS]:
        body += (
            f"<tr><td>{escape(kind)}{f' ×{len(members):,}' if len(members) > 1 else ''}{small(reason)}</td>"
            f"<td>{svg.few(row.dtype for row in members)}<small>{svg.few(row.shape for row in members)}</small></td>"
            f'<td class="n">{size(_sum(members, "after"))}{small(percent(_sum(members, "after") / whole))}</td></tr>'
        )
    text = f"{len(still):,} of {len(rows):,} tensors, {size(after)}: {percent(after / whole)} of the result.{_more(groups)}"
    table = svg.table("What was kept", ["Tensors and reason", "Stored as", "Bytes"], f"<tbody>{body}</tbody>", 2)
    return svg.section("Kept as it was", f"<p>{text}</p>{table}") if still else ""


def changed(rows: list[Row]) -> str:
    """What was compressed, a line per action, encoding and reason."""
    worked = _changed(rows)
    groups = _grouped(worked, lambda row: (row.action, row.source, row.dtype, row.reason))
    name = next(iter(_error_names(rows)), None)
    form, body = _form(name), ""
    for (action, source, target, reason), members in groups[:MOST_GROUPS]:
        errors = [row.error[name] for row in members if name in row.error]
        params, before, after = (sum(getattr(row, side) for row in members) for side in ("params", "before", "after"))
        measured = f"{form(sum(errors) / len(errors))}{small(f'worst {form(max(errors))}')}" if errors else ""
        body += (
            f"<tr><td>{escape(action)} {escape(source)} → {escape(target)}{small(reason)}"
            f"<small>{svg.few((row.kind for row in members), 8)}</small></td>"
            f'<td class="n">{len(members):,}</td><td class="n">{size(after)}{small(f"{size(before)} before")}</td>'
            f'<td class="n">{number(8 * after / params, 4) if params else ""}</td><td class="n">{measured}</td></tr>'
        )
    text = f"{len(worked):,} of {len(rows):,} tensors, {size(_sum(worked, 'before'))} → {size(_sum(worked, 'after'))}.{_more(groups)}"
    heads = ["What and why", "Tensors", "Bytes", "Bits", "Mean error"]
    table = svg.table("Tensors changed", heads, f"<tbody>{body}</tbody>", 1)
    return svg.section("What changed", f"<p>{text}</p>{table}") if worked else ""


def by_layer(rows: list[Row]) -> str:
    """Error, bits and zeros against the layer, a line per kind of module; then the worst tensors."""
    worked, parts, errors = _changed(rows), [], _error_names(rows)
    groups = _grouped([row for row in worked if row.layer is not None], lambda row: row.kind)  # same order, same colour

    def chart(key: str, title: str, text: str, read: Callable[[Row], float | None], unit: str) -> None:
        points = [(kind, row.layer, read(row)) for kind, members in groups for row in members if read(row) is not None]
        parts.append(svg_plots.lines(key, title, text, points, unit, "layer"))

    for name in errors[:2]:
        title, text = ERRORS.get(name, (name.replace("_", " ").capitalize(), "As the command measured it."))
        chart(name, title, text, lambda row, name=name: row.error.get(name), _unit(name))
    bits = [row.bits for row in worked if row.bits is not None]
    if bits and max(bits) - min(bits) >= 0.5:
        chart("bits", "Bits per weight", "Scales and zero points counted.", lambda row: row.bits, "number")
    if max((row.sparsity or 0 for row in worked), default=0) >= 0.01:
        chart("zeros", "Zeros", "Share of the weights that are zero.", lambda row: row.sparsity, "percent")
    measured = [row for row in worked if errors and errors[0] in row.error]
    if len(measured) > 10:
        body = "".join(
            f'<tr><td class="name">{escape(row.name)}</td><td>{escape(row.dtype)}</td><td class="n">{_form(errors[0])(row.error[errors[0]])}</td></tr>'
            for row in sorted(measured, key=lambda row: (-row.error[errors[0]], row.name))[:5]
        )
        parts.append(svg.table("Largest errors", ["Largest errors", "Stored as", "Error"], f"<tbody>{body}</tbody>", 2))
    return svg.section("Layer by layer", "".join(parts))


def every_tensor(rows: list[Row]) -> str:
    """All tensors, folded; a group per action and reason."""
    name, bodies = next(iter(_error_names(rows)), None), ""
    groups = _grouped(rows[:MOST_ROWS], lambda row: (row.action, row.reason))
    for (action, reason), members in sorted(groups, key=lambda group: group[0][0] != "keep"):
        title = f"{action}: {reason}" if reason else action
        bodies += f'<tbody><tr><th colspan="7" scope="rowgroup">{escape(title)} ({len(members):,})</th></tr>\n'
        bodies += "".join(_tensor_row(row, name) for row in members) + "</tbody>"
    cut = f"<p>The first {MOST_ROWS:,}; all are in report.json.</p>" if len(rows) > MOST_ROWS else ""
    heads = ["Tensor", "Stored as", "Shape", "Before", "After", "Bits", "Error"]
    table = svg.searchable_table("Every tensor", heads, bodies, 3)
    body = f"<details><summary>{len(rows):,} tensors</summary>{cut}{table}</details>"
    return svg.section("Every tensor", body) if rows else ""


def _tensor_row(row: Row, name: str | None) -> str:
    """Raw numbers in data-v are what sorting compares."""
    bits = "" if row.bits is None else number(row.bits, 4)
    value = row.error.get(name)
    error = "<td></td>" if value is None else f'<td data-v="{value:.6g}">{_form(name)(value)}</td>'
    return (
        f"<tr><td>{escape(row.name)}</td><td>{escape(row.dtype)}</td><td>{row.shape}</td><td data-v={row.before}>{size(row.before)}</td>"
        f"<td data-v={row.after}>{size(row.after)}</td><td>{bits}</td>{error}</tr>\n"
    )


def provenance(content: dict) -> str:
    """What it takes to do it again."""
    pairs = [("tersor", content["version"]), ("device", content["device"]), ("seed", str(content["seed"]))]
    for side in ("input", "output"):
        if content[side]:
            pairs.append((side, f"{content[side]['path']}, fingerprint {content[side]['fingerprint']}"))
    pairs += [svg.keyed(key, value) for key, value in content["args"].items() if key not in ("seed", "device")]
    return svg.section("How to do it again", f"<p>{svg.command(command_line(content))}</p>{svg.facts(pairs)}")


# ---------------------------------------------------------------- words and groups


def command_line(step: dict) -> str:
    """The shell line of a step, from its arguments; what was not set is left out."""
    words = ["tersor", str(_get(step, "command"))]
    if not _get(step, "args", "config"):  # a new model, which begins from no checkpoint of its own
        words.append(str(_get(step, "input", "path") or "MODEL"))
    words += ["-o", str(output)] if (output := _get(step, "output", "path")) else []
    arguments = _get(step, "args")
    for key, value in arguments.items() if isinstance(arguments, dict) else ():
        option = "--" + str(key).replace("_", "-")
        if isinstance(value, bool):
            words += [option] if value else [NEGATIONS[key]] if key in NEGATIONS else []
        elif value is not None:
            for item in value if isinstance(value, list) else [value]:
                words += [f"{option}={item}"] if str(item).startswith("-") else [option, str(item)]
    return shlex.join(words)


def _headline(content: dict) -> str:
    args, (before, after) = content["args"], _bytes(content)
    verb = content["command"].capitalize()
    verb = verb[:-1] + "ied" if verb.endswith("y") else verb.removesuffix("e") + "ed"
    what = f"{args['remove']} of " if args.get("remove") else ""
    text = f"{verb} {what}{_stem(content['input']['path'])}"
    text += f" to {args.get('scheme') or args['to']}" if args.get("scheme") or args.get("to") else ""
    text += f" with {args['method']}" if args.get("method") else ""
    text += f" at {percent(args['sparsity'])} sparsity" if isinstance(args.get("sparsity"), float) else ""
    return f"{text}: {size(before)} became {size(after)}, {ratio(before, after)}" if after and before != after else text


def _bytes(content: dict) -> tuple[int, int]:
    """Before and after: the files where both are known, else the tensors."""
    if content["output"]:
        return content["input"]["bytes"], content["output"]["bytes"]
    return content["totals"]["bytes_before"], content["totals"]["bytes_after"]


def _get(value: Any, *keys: str) -> Any:
    """A value deep in the report of another run, which may hold anything: None where it is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _stem(path: Any) -> str:
    return Path(str(path or "?")).name or str(path)


def _changed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.action != "keep"]


def _sum(rows: list[Row], side: str) -> int:
    return sum(getattr(row, side) for row in rows)


def _grouped(rows: list[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows of the same key together, the most bytes first."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return sorted(groups.items(), key=lambda item: (-_sum(item[1], "before"), item[0]))


def _more(groups: list) -> str:
    return f" The {MOST_GROUPS} largest groups of {len(groups):,}:" if len(groups) > MOST_GROUPS else ""


def _error_names(rows: list[Row]) -> list[str]:
    """Which errors were measured: those we can explain first."""
    found = {name for row in rows for name in row.error} - SAME_ERROR
    return [name for name in ERRORS if name in found] + sorted(found - ERRORS.keys())


def _unit(error_name: str | None) -> str:
    return "percent" if error_name in ERRORS else "number"


def _form(error_name: str | None) -> Callable[[float], str]:
    return getattr(units, _unit(error_name))
