"""Small integers in a dense bitstream: what compressed-tensors and GPTQ store.

Element i of a row takes bits [i b, i b + b) of the row's stream, counted from bit 0 of word 0 upwards, so a value may lie
across two words (formats: compressed-tensors ≥ 0.18 and GPTQ agree on this for every width).
"""

from __future__ import annotations

from math import gcd

import torch
from tersor.formats.errors import TersorError

PANEL_VALUES = 1 << 20  # worked on at a time: what packing needs beside its input and output


def packed_columns(columns: int, bits: int) -> int:
    """int32 words that a row of `columns` values takes."""
    return -(-columns * bits // 32)


def pack_rows(values: torch.Tensor, bits: int, offset: int = 0) -> torch.Tensor:
    """Values `[rows, columns]` + `offset`, then 0 to 2^bits - 1, to int32 words `[rows, ceil(columns * bits / 32)]`."""
    rows, columns = values.shape
    packed = torch.empty(rows, packed_columns(columns, bits), dtype=torch.int32, device=values.device)
    for panel in _panels(rows, columns):
        packed[panel] = _pack_panel((values[panel] + offset).to(torch.uint8), bits)
    return packed


def _panels(rows: int, columns: int) -> list[slice]:
    step = max(1, PANEL_VALUES // max(1, columns))
    return [slice(first, first + step) for first in range(0, rows, step)]


def _pack_panel(values: torch.Tensor, bits: int) -> torch.Tensor:
    rows, columns = values.shape
    words = packed_columns(columns, bits)
    if missing := words * 32 // bits - columns if 32 % bits == 0 else -columns % _period(bits):
        values = torch.nn.functional.pad(values, (0, missing))
    if 8 % bits == 0:
        packed = values[:, :: 8 // bits].clone()
        for position in range(1, 8 // bits):
            packed |= values[:, position :: 8 // bits] << (bits * position)
    else:
        packed = _pack_across_bytes(values, bits)
    packed = packed[:, : words * 4]
    packed = torch.nn.functional.pad(packed, (0, words * 4 - packed.shape[1]))
    return packed.contiguous().reshape(-1).view(torch.int32).reshape(rows, words)


def unpack_rows(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int32 words `[rows, words]` back to uint8 values `[rows, columns]`. Raises TersorError when the words do not fit."""
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise TersorError(
            f"packed words are {str(packed.dtype).removeprefix('torch.')} {list(packed.shape)}, expected int32 [rows, words]",
            "the tensor is damaged, or packed in another layout",
        )
    rows, words = packed.shape
    if words != packed_columns(columns, bits):
        raise TersorError(
            f"{words} packed words a row, {columns} values of {bits} bits take {packed_columns(columns, bits)}",
            "the tensor is damaged, or packed in another layout",
        )
    values = torch.empty(rows, columns, dtype=torch.uint8, device=packed.device)
    for panel in _panels(rows, columns):
        values[panel] = _unpack_panel(packed[panel], bits, columns)
    return values


def _unpack_panel(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    rows, words = packed.shape
    raw = packed.contiguous().reshape(-1).view(torch.uint8).reshape(rows, words * 4)
    if 8 % bits:
        return _unpack_across_bytes(raw, bits, columns)
    per_byte, mask = 8 // bits, 2**bits - 1
    values = torch.empty(rows, raw.shape[1], per_byte, dtype=torch.uint8, device=packed.device)
    for position in range(per_byte):
        torch.bitwise_and(raw >> (bits * position), mask, out=values[:, :, position])
    return values.reshape(rows, words * 4 * per_byte)[:, :columns]


def _period(bits: int) -> int:
    """Values after which the stream is back at a byte border."""
    return 8 // gcd(8, bits)


def _pack_across_bytes(values: torch.Tensor, bits: int) -> torch.Tensor:
    period = _period(bits)
    nbytes = period * bits // 8
    rows, chunked = values.shape[0], values.shape[1] // period
    chunks = values.reshape(rows, chunked, period).to(torch.int64)
    shifts = torch.arange(period, device=values.device) * bits
    joined = (chunks << shifts).sum(dim=-1)
    places = torch.arange(nbytes, device=values.device) * 8
    return ((joined[:, :, None] >> places) & 255).to(torch.uint8).reshape(rows, chunked * nbytes)


def _unpack_across_bytes(raw: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    period = _period(bits)
    nbytes = period * bits // 8
    raw = torch.nn.functional.pad(raw, (0, -raw.shape[1] % nbytes))
    rows, chunked = raw.shape[0], raw.shape[1] // nbytes
    chunks = raw.reshape(rows, chunked, nbytes).to(torch.int64)
    joined = (chunks << (torch.arange(nbytes, device=raw.device) * 8)).sum(dim=-1)
    shifts = torch.arange(period, device=raw.device) * bits
    values = (joined[:, :, None] >> shifts) & (2**bits - 1)
    return values.to(torch.uint8).reshape(rows, chunked * period)[:, :columns]
