"""The kernels of bitmap and 2:4 weights build ahead of time for each GPU generation, with the tiles they are launched with,
and fit the GPU's shared memory; no GPU is needed."""

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import TARGETS, build  # noqa: E402
from tersor.kernels import bitmap_matmul, semi_structured  # noqa: E402

FEW, SOME, MANY = 1, 64, 512  # tokens
BITMAP = {
    "x_ptr": "*bf16",
    "values_ptr": "*bf16",
    "bitmask_ptr": "*u8",
    "offsets_ptr": "*i32",
    "scale_ptr": "*bf16",
    "out_ptr": "*fp32",
}
SEMI = {"x_ptr": "*bf16", "compressed_ptr": "*bf16", "bitmask_ptr": "*u8", "scale_ptr": "*bf16", "out_ptr": "*bf16"}
BYTES = {"values_ptr": "*u8"}


def dot(dtype):
    return getattr(triton.language, str(dtype).removeprefix("torch."))


def values(options, dtype, bits=0, e4m3=False, scale=False):
    return {"HAS_SCALE": scale, "BITS": bits, "E4M3": e4m3, "DOT": dot(dtype), **options}


def bitmap(tokens, dtype=torch.bfloat16, block=128, **what):
    return values(bitmap_matmul.launch_options(tokens, block, dtype), dtype, **what)


def semi(tokens, dtype=torch.bfloat16, group_size=None, **what):
    return values(semi_structured.launch_options(tokens, group_size, dtype), dtype, **what)


# Name, kernel, types of its pointers (every other argument is an i32), compile-time values and options, targets.
MULTIPLY, EXPAND = bitmap_matmul._bitmap_matmul_kernel, bitmap_matmul._expand_kernel
TWO_FOUR = semi_structured._semi_structured_matmul_kernel
SPREAD = {"BLOCK_N": 32, "BLOCK_K": 128}
TWO = ("sm_90", "gfx942")
FLOAT32 = {"x_ptr": "*fp32", "values_ptr": "*fp32"}
BUILDS = [
    ("bitmap", MULTIPLY, BITMAP, bitmap(FEW), TARGETS),
    ("bitmap_32", MULTIPLY, BITMAP, bitmap(32), ("gfx942",)),
    ("bitmap_64", MULTIPLY, BITMAP, bitmap(SOME), TARGETS),
    ("bitmap_blocks_of_32", MULTIPLY, BITMAP, bitmap(FEW, block=32), TWO),
    ("bitmap_float32", MULTIPLY, BITMAP | FLOAT32, bitmap(SOME, torch.float32), ("sm_80", "gfx942")),
    ("bitmap_int8", MULTIPLY, BITMAP | {"values_ptr": "*i8"}, bitmap(MANY, scale=True), TWO),
    ("bitmap_int4", MULTIPLY, BITMAP | BYTES, bitmap(FEW, bits=4, scale=True), ("sm_80", "gfx942")),
    ("bitmap_e4m3", MULTIPLY, BITMAP | BYTES, bitmap(FEW, e4m3=True, scale=True), TWO),
    (
        "bitmap_expand",
        EXPAND,
        {name: kind for name, kind in BITMAP.items() if name != "x_ptr"} | {"out_ptr": "*bf16"},
        {"HAS_SCALE": True, "BITS": 0, "E4M3": False, **SPREAD},
        TWO,
    ),
    ("semi_structured", TWO_FOUR, SEMI, semi(FEW), TARGETS),
    ("semi_structured_many", TWO_FOUR, SEMI, semi(MANY), TARGETS),
    (
        "semi_structured_float32",
        TWO_FOUR,
        SEMI | {"x_ptr": "*fp32", "compressed_ptr": "*fp32"},
        semi(SOME, torch.float32),
        ("sm_80", "gfx942"),
    ),
    ("semi_structured_int8", TWO_FOUR, SEMI | {"compressed_ptr": "*i8"}, semi(FEW, group_size=128, scale=True), TWO),
    (
        "semi_structured_int4",
        TWO_FOUR,
        SEMI | {"compressed_ptr": "*u8"},
        semi(FEW, group_size=32, bits=4, scale=True),
        TWO,
    ),
    (
        "semi_structured_e4m3",
        TWO_FOUR,
        SEMI | {"compressed_ptr": "*u8"},
        semi(MANY, group_size=128, e4m3=True, scale=True),
        TWO,
    ),
]


@pytest.mark.parametrize(("case", "target"), [pytest.param(b, t, id=f"{b[0]}-{t}") for b in BUILDS for t in b[4]])
def test_builds(case, target, tmp_path, monkeypatch):
    _, kernel, pointers, values, _ = case
    build(kernel, pointers, values, target, tmp_path, monkeypatch)
