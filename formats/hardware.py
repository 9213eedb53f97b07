"""What a device can do, as far as predictions need it: TOML files, some that ship with the package and those of a user.

    name = "H100 SXM 80 GB"
    memory_bytes = 80e9
    memory_gbps = 3350            # gigabytes (10^9) a second
    [peak_flops]                  # dense, not counting 2:4 sparsity, in FLOP/s
    bf16 = 989.4e12

The other keys are the fields of `Hardware` and have defaults.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

from tersor.formats.errors import TersorError

FOLDER = Path(__file__).parent / "hardware"
HOST = "host"
PRECISIONS = ("bf16", "fp16", "fp8", "int8", "tf32", "fp32")
# What a device computes in when it does not have a precision: the operands are widened first.
WIDER = {"fp8": "bf16", "int8": "bf16", "fp16": "bf16", "bf16": "fp16", "tf32": "fp32"}


@dataclass(frozen=True)
class Hardware:
    """One device. `peak_flops` is per precision and dense; `*_gbps` are 10^9 bytes a second in one direction.

    The efficiencies are the share of a peak that large operators reach. `dequantize_efficiency` is the share of the
    compute peak left to a matmul that unpacks its weights on the way. `kernel_floor_seconds` is what starting one
    operator takes. `sparse_speedup` is the factor on the peak for 2:4 sparse weights, 1 for a device without it.
    `link_gbps` is to the other devices of a node, `pcie_gbps` to the host.
    """

    name: str
    peak_flops: dict[str, float]
    memory_bytes: float
    memory_gbps: float
    compute_efficiency: float = 0.7
    memory_efficiency: float = 0.7
    dequantize_efficiency: float = 0.85
    kernel_floor_seconds: float = 0.0
    sparse_speedup: float = 1.0
    dollars_per_hour: float | None = None
    link_gbps: float | None = None
    pcie_gbps: float | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def supports(self, precision: str) -> bool:
        return precision in self.peak_flops

    def computes_in(self, precision: str) -> str:
        """`precision`, or the next wider one that the device has."""
        tried = []
        while precision not in self.peak_flops and precision not in tried:
            tried.append(precision)
            precision = WIDER.get(precision, "fp32")
        return precision if precision in self.peak_flops else max(self.peak_flops, key=self.peak_flops.get)

    def flops(self, precision: str) -> float:
        """FLOP/s that large dense operators reach."""
        return self.peak_flops[self.computes_in(precision)] * self.compute_efficiency

    @property
    def bytes_per_second(self) -> float:
        """What large operators reach."""
        return self.memory_gbps * 1e9 * self.memory_efficiency


SHARES = ("compute_efficiency", "memory_efficiency", "dequantize_efficiency")
MAY_BE_ZERO = ("kernel_floor_seconds", "dollars_per_hour")


def names() -> list[str]:
    """The devices that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def host_path() -> Path:
    """Where `tersor profile --measure` keeps what it found out about this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tersor" / "host.toml"


def load_hardware(name_or_path: str | Path) -> Hardware:
    """A built-in device, `host`, or a `.toml` file. Raises TersorError for an unknown name or a wrong file."""
    name = str(name_or_path)
    if name.endswith(".toml"):
        return _parse(Path(name), "give an existing .toml file")
    if name.lower() == HOST:
        return _parse(host_path(), "this machine was not measured yet: run `tersor profile MODEL --measure` once")
    if name.lower() not in names():
        raise TersorError(
            f"unknown hardware {name!r}",
            f"known are {', '.join([*names(), HOST])}, or give a .toml file that describes it",
        )
    return _parse(FOLDER / f"{name.lower()}.toml", "install tersor again")


def save_hardware(hardware: Hardware, path: Path) -> None:
    """Write `hardware` so that `load_hardware(path)` gives it back; the file is there whole or not at all."""
    lines = []
    for entry in fields(Hardware):
        value = getattr(hardware, entry.name)
        if value is not None and not isinstance(value, dict):
            lines.append(f"{entry.name} = {_toml(value)}")
    for table in ("peak_flops", "notes"):
        if getattr(hardware, table):
            lines += [
                "",
                f"[{table}]",
                *(f"{_toml(key)} = {_toml(value)}" for key, value in getattr(hardware, table).items()),
            ]
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("\n".join(lines) + "\n", "utf-8")
        partial.replace(path)
    except OSError as error:
        raise TersorError(f"{path}: {error.strerror}", "choose a place that can be written to") from error


def _toml(value: object) -> str:
    if not isinstance(value, str):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # the one that JSON leaves and TOML forbids


def _parse(path: Path, missing: str) -> Hardware:
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise TersorError(f"{path}: no such hardware file", missing) from error
    except OSError as error:
        raise TersorError(f"{path}: {error.strerror}", missing) from error
    except ValueError as error:  # tomllib's, and that of text that is not UTF-8
        raise TersorError(f"{path}: not readable as TOML ({error})", "see toml.io for the syntax") from error
    known = {entry.name for entry in fields(Hardware)}
    for key in content:
        if key not in known:
            raise TersorError(f"{path}: key {key!r} is not known", f"known are {', '.join(sorted(known))}")
    for key in ("name", "peak_flops", "memory_bytes", "memory_gbps"):
        if key not in content:
            raise TersorError(f"{path}: key {key!r} is missing", "see tersor/formats/hardware/h100.toml for an example")
    for key, value in content.items():
        _check(path, key, value)
    return Hardware(**content)


def _check(path: Path, key: str, value: object) -> None:
    def wrong(what: str) -> TersorError:
        return TersorError(f"{path}: {key} is {value!r}", f"it should be {what}")

    if key == "name":
        if not isinstance(value, str) or not value:
            raise wrong("text")
    elif key == "notes":
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise wrong("a table of texts")
    elif key == "peak_flops":
        good = isinstance(value, dict) and value and set(value) <= set(PRECISIONS)
        if not good or not all(_is_number(speed) and speed > 0 for speed in value.values()):
            raise wrong(f"a table of positive FLOP/s for some of {', '.join(PRECISIONS)}")
    elif not _is_number(value) or value < 0 or (value == 0 and key not in MAY_BE_ZERO):
        raise wrong("a positive number")
    elif key in SHARES and value > 1:
        raise wrong("a share, above 0 and at most 1")
    elif key == "sparse_speedup" and value < 1:
        raise wrong("a factor of at least 1")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
