"""Several checkpoints side by side: what they weigh, how fast they are predicted to be, and what they were measured at."""

from __future__ import annotations

from pathlib import Path

from tersor.formats import units
from tersor.formats.page import Plot, Section, Table
from tersor.formats.report import Report


def quality_of(folder: Path) -> dict:
    """What `evaluate --record` left in the checkpoint's report: perplexity, and on which text."""
    if not (folder / "report.json").is_file():
        return {}
    found = Report.load(folder).quality
    return {key: found[key] for key in ("perplexity", "text", "tokens", "window_tokens") if key in found}


def compare(models: list[dict]) -> list[Section]:
    """`models` are the entries of the report's `quality["models"]`; the first is what the others are held against."""
    rows = [[model["name"], *_cells(model, models[0])] for model in models]
    columns = [
        "",
        "bytes",
        "of the first",
        "parameters",
        "first token",
        "per token",
        "tokens/s",
        "KV per token",
        "perplexity",
    ]
    texts = {model["quality"]["text"] for model in models if "perplexity" in model["quality"]}
    note = f"Perplexity as recorded, on {', '.join(sorted(map(str, texts)))}." if texts else ""
    if len(texts) > 1:
        note += " Not the same text: do not compare."
    hardware = next((model["headers"]["hardware"]["name"] for model in models if model["headers"]["model"]), None)
    lead = f"Predicted for {hardware}." if hardware else ""
    items: list = [Table("", columns, rows, note=note)]
    measured = [
        (float(model["bytes"]), model["quality"]["perplexity"], model["name"])
        for model in models
        if model["quality"].get("perplexity")
    ]
    if len(measured) > 1 and len(texts) == 1:
        title, note = "Quality against size", "Down and to the left is better."
        axes = {"log_x": True, "unit_x": "size"}
        items.append(Plot(title, note, "bytes", "perplexity", points={"": measured}, **axes))
    return [Section("Side by side", items, lead)]


def _cells(model: dict, first: dict) -> list[str]:
    headers = model["headers"]
    cells = [
        units.size(model["bytes"]),
        units.percent(model["bytes"] / max(first["bytes"], 1)),
        units.count(headers["params"]),
    ]
    serving = headers.get("serving") or {}
    cells.append(_latency(serving, "first_token_seconds"))
    cells.append(_latency(serving, "token_seconds"))
    speed = serving.get("decode_tokens_per_second")
    cells.append(units.number(speed) if speed else "")
    cache = headers.get("kv_cache")
    cells.append(units.size(cache["bytes_per_token"]) if cache else "")
    perplexity = model["quality"].get("perplexity")
    return [*cells, units.number(perplexity, 4) if perplexity else ""]


def _latency(serving: dict, key: str) -> str:
    return units.latency(serving[key]) if key in serving else ""
