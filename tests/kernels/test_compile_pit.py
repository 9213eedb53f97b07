"""The kernels of packed micro-tiles build ahead of time for every GPU generation, as they are launched."""

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import TARGETS, build  # noqa: E402
from tersor.kernels import active_matmul, count_tiles, grouped_matmul, sparse_index, tile_matmul  # noqa: E402

ONE, MANY = 1, 4096  # tokens
TYPES = {torch.bfloat16: ("*bf16", triton.language.bfloat16), torch.float32: ("*fp32", triton.language.float32)}


def finder(tile, store):
    pointers = {"bits_ptr": "*i16", "count_ptr": "*i32", "index_ptr": "*i32"}
    flags = {"MASK": 0x7FFF, "COLUMN_FIBRES": count_tiles.is_m_axis(tile), "STORE": store, "R": tile[0], "C": tile[1]}
    return count_tiles._find_tiles_kernel, pointers, flags | count_tiles.launch_options(tile)


def compaction(tile):
    pointers = {"list_ptr": "*i32", "start_ptr": "*i32", "x_ptr": "*i16", "index_ptr": "*i32", "values_ptr": "*i16"}
    flags = {"VALUES": True, "COLUMN_FIBRES": count_tiles.is_m_axis(tile), "R": tile[0], "C": tile[1]}
    return sparse_index._compact_kernel, pointers, flags | count_tiles.launch_options(tile)


def columns(tokens, tile, dtype=torch.bfloat16):
    stored, dot = TYPES[dtype]
    pointers = {"x_ptr": stored, "values_ptr": stored, "index_ptr": "*i32", "start_ptr": "*i32"}
    pointers["out_ptr"] = "*fp32" if tokens == ONE else stored
    transposed = tokens > tile_matmul.DECODE and tile[1] < tile_matmul.WIDE
    flags = {"R": tile[0], "C": tile[1], "TRANSPOSED": transposed, "DOT": dot}
    return tile_matmul._tile_columns_kernel, pointers, flags | tile_matmul.launch_options(tokens, tile, dtype)


def rows(tokens, dtype=torch.bfloat16):
    stored, dot = TYPES[dtype]
    pointers = {"x_ptr": stored, "values_ptr": stored, "start_ptr": "*i32", "products_ptr": "*fp32"}
    options = tile_matmul.launch_options(tokens, (1, 64), dtype)
    return tile_matmul._tile_rows_kernel, pointers, {"C": 64, "DOT": dot} | options


def row_sums(tokens):
    pointers = {"products_ptr": "*fp32", "row_start_ptr": "*i32", "row_tile_ptr": "*i32", "out_ptr": "*bf16"}
    block_m = tile_matmul.launch_options(tokens, (1, 64), torch.bfloat16)["BLOCK_M"]
    return tile_matmul._sum_rows_kernel, pointers, {"BLOCK_M": block_m, "BLOCK_N": 32}


def grouped(per_expert, dtype=torch.bfloat16):
    stored, dot = TYPES[dtype]
    pointers = {"x_ptr": stored, "weights_ptr": stored, "token_ptr": "*i32", "expert_start_ptr": "*i32"}
    pointers |= {"pair_weight_ptr": "*fp32", "out_row_ptr": "*i32", "out_ptr": stored}
    flags = {"GATHER": True, "WEIGHTED": True, "SCATTER": True, "DOT": dot, "EXPERTS": 128}
    options = grouped_matmul.launch_options(per_expert, dtype)
    return grouped_matmul._grouped_matmul_kernel, pointers, flags | {"GROUP": grouped_matmul.GROUP_M} | options


def active(dtype=torch.bfloat16):
    stored, dot = TYPES[dtype]
    pointers = {"x_ptr": stored, "weight_ptr": stored, "index_ptr": "*i32", "count_ptr": "*i32", "out_ptr": "*fp32"}
    flags = {"DOT": dot, "SEGMENT": active_matmul.SEGMENT} | active_matmul.launch_options(dtype)
    return active_matmul._active_matmul_kernel, pointers | {"threshold": "fp32"}, flags


def find_active(tokens):
    pointers = {"x_ptr": "*bf16", "index_ptr": "*i32", "count_ptr": "*i32", "threshold": "fp32"}
    return active_matmul._find_active_kernel, pointers, {"BLOCK_M": tokens, "SEGMENT": active_matmul.SEGMENT}


NEW, OLD = ("sm_90", "gfx942"), ("sm_80", "gfx942")
BUILDS = [
    ("count_32x1", *finder((32, 1), False), NEW),
    ("find_32x1", *finder((32, 1), True), TARGETS),
    ("find_1x64", *finder((1, 64), True), NEW),
    ("find_32x32", *finder((32, 32), True), NEW),
    ("compact_32x1", *compaction((32, 1)), TARGETS),
    ("compact_1x64", *compaction((1, 64)), NEW),
    ("tiles_32x1", *columns(MANY, (32, 1)), TARGETS),
    ("tiles_32x1_decode", *columns(ONE, (32, 1)), NEW),
    ("tiles_32x1_float32", *columns(MANY, (32, 1), torch.float32), OLD),
    ("tiles_16x1", *columns(MANY, (16, 1)), NEW),
    ("tiles_128x1", *columns(MANY, (128, 1)), NEW),
    ("tiles_16x16", *columns(MANY, (16, 16)), NEW),
    ("tiles_32x32", *columns(MANY, (32, 32)), TARGETS),
    ("tiles_32x32_decode", *columns(ONE, (32, 32)), NEW),
    ("tiles_1x64", *rows(MANY), TARGETS),
    ("tiles_1x64_decode", *rows(ONE), NEW),
    ("tiles_1x64_float32", *rows(MANY, torch.float32), OLD),
    ("row_sums", *row_sums(MANY), TARGETS),
    ("row_sums_decode", *row_sums(ONE), NEW),
    ("grouped", *grouped(512), TARGETS),
    ("grouped_few", *grouped(40), NEW),
    ("grouped_decode", *grouped(1), NEW),
    ("grouped_float32", *grouped(512, torch.float32), OLD),
    ("active", *active(), TARGETS),
    ("active_float32", *active(torch.float32), OLD),
    ("find_active", *find_active(16), TARGETS),
]


@pytest.mark.parametrize(("case", "target"), [pytest.param(b, t, id=f"{b[0]}-{t}") for b in BUILDS for t in b[4]])
def test_builds(case, target, tmp_path, monkeypatch):
    _, kernel, pointers, values, _ = case
    build(kernel, pointers, values, target, tmp_path, monkeypatch)
