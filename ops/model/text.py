"""Text in: from a file, a Hub dataset or the shipped prose to one string, without torch."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from tersor.formats.errors import TersorError

TEXT_KEYS = ("text", "content", "prompt", "document")
SHIPPED = "the shipped public-domain prose"


def default_text() -> str:
    return (files("tersor.ops.model") / "data" / "calibration.txt").read_text("utf-8")


def load_text(source: str | None) -> str:
    """`.txt` as it is; `.jsonl` and `.parquet` by their text column; a Hub dataset id through its parquet files."""
    if source is None:
        return default_text()
    path = Path(source).expanduser()
    if not path.exists():
        path = _from_hub(source)
    try:
        if path.suffix in (".jsonl", ".json"):
            text = _from_jsonl(path)
        elif path.suffix == ".parquet":
            text = _from_parquet(path)
        else:
            text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TersorError(f"{path}: not readable as text ({error})", "give UTF-8 .txt, .jsonl or .parquet") from error
    if not text.strip():
        raise TersorError(f"{path}: holds no text", "give a file with text in it")
    return text


def _from_jsonl(path: Path) -> str:
    documents = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TersorError(
                f"{path}: line {number} is not JSON ({error})", "one JSON object or string a line"
            ) from error
        key = next((key for key in TEXT_KEYS if isinstance(row, dict) and isinstance(row.get(key), str)), None)
        if not isinstance(row, str) and key is None:
            raise TersorError(
                f"{path}: line {number} has no text", f"one of the keys {', '.join(TEXT_KEYS)} must be there"
            )
        documents.append(row if isinstance(row, str) else row[key])
    return "\n\n".join(documents)


def _from_parquet(path: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise TersorError(f"{path}: not a parquet file ({error})", "save it again") from error
    column = next((key for key in TEXT_KEYS if key in table.column_names), None)
    if column is None:
        raise TersorError(f"{path}: columns are {table.column_names}", f"name one of them {', '.join(TEXT_KEYS)}")
    return "\n\n".join(value for value in table.column(column).to_pylist() if value)


def _from_hub(source: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    if source.count("/") != 1:
        raise TersorError(
            f"{source}: no such file", "give a .txt, .jsonl or .parquet file, or a Hub dataset (org/name)"
        )
    try:
        names = HfApi().list_repo_files(source, repo_type="dataset")
        found = sorted(name for name in names if name.endswith((".parquet", ".jsonl", ".txt")))
        return Path(hf_hub_download(source, found[0], repo_type="dataset"))
    except Exception as error:  # the hub client raises its own, the HTTP library's and OS errors alike
        raise TersorError(
            f"{source}: not a local file, and no text to be had from the Hub ({type(error).__name__})",
            "give a .txt, .jsonl or .parquet file",
        ) from error
