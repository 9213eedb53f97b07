"""Every Triton kernel builds ahead of time for each GPU generation we support, with the tiles it is launched with, and
fits the GPU's shared memory; no GPU is needed."""

import pytest
import torch

triton = pytest.importorskip("triton")

from ahead_of_time import TARGETS, build  # noqa: E402
from tersor.kernels import (  # noqa: E402
    dequantize,
    error_compensation,
    fp8_matmul,
    group_quantize,
    group_range,
    int4_matmul,
    int8_matmul,
    search_clip,
)

NATIVE_FP8 = ("sm_90", "sm_100")
EMULATED_FP8 = ("sm_80", "gfx942")

GRID = {"EPS": 0.0078125, "BITS": 4, "SYMMETRIC": False, "DTYPE": 1}
INT4 = {"x_ptr": "*bf16", "packed_ptr": "*i32", "scale_ptr": "*bf16", "zero_point_ptr": "*i8", "out_ptr": "*fp32"}
INT8 = {"x_ptr": "*i8", "weight_ptr": "*i8", "x_scale_ptr": "*fp32", "weight_scale_ptr": "*bf16", "out_ptr": "*bf16"}
FP8_BYTES = INT8 | {"x_ptr": "*u8", "weight_ptr": "*u8"}
FP8 = INT8 | {"x_ptr": "*fp8e4nv", "weight_ptr": "*fp8e4nv"}
ONE, MANY = 1, 512  # tokens


def int4(tokens, dtype):
    name = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[dtype]
    return {
        "HAS_ZERO_POINT": True,
        "DOT": getattr(triton.language, name),
        **int4_matmul.launch_options(tokens, 32, 128, dtype),
    }


def fp8(tokens, native, blockwise):
    return {"NATIVE": native, "BLOCKWISE": blockwise, **fp8_matmul.launch_options(tokens)}


# Name, kernel, types of its pointers (every other argument is an i32), compile-time values and options, targets.
BUILDS = [
    (
        "compensate",
        error_compensation._compensate_block_kernel,
        {
            "weight_ptr": "*fp32",
            "factor_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "zero_point_ptr": "*i8",
            "group_index_ptr": "*i64",
            "keep_ptr": "*u8",
            "codes_ptr": "*i8",
            "quantized_ptr": "*fp32",
            "error_ptr": "*fp32",
        },
        {
            "LOW": -8,
            "HIGH": 7,
            "HAS_SCALE": True,
            "HAS_ZERO_POINT": True,
            "HAS_KEEP": True,
            "BLOCK_ROWS": 32,
            "BLOCK_COLUMNS": 128,
        },
        TARGETS,
    ),
    (
        "minmax_scale",
        group_range._minmax_scale_kernel,
        {"weight_ptr": "*bf16", "scale_ptr": "*fp32", "zero_point_ptr": "*i8"},
        GRID | {"BLOCK_N": 8, "BLOCK_COLUMNS": 128},
        TARGETS,
    ),
    (
        "group_quantize",
        group_quantize._group_quantize_kernel,
        {"weight_ptr": "*bf16", "scale_ptr": "*bf16", "zero_point_ptr": "*i8", "out_ptr": "*i8"},
        {"LOW": -8, "HIGH": 7, "HAS_ZERO_POINT": True, "BLOCK": 1024},
        TARGETS,
    ),
    (
        "quantize_and_pack",
        group_quantize._quantize_and_pack_kernel,
        {"weight_ptr": "*bf16", "packed_ptr": "*i32", "scale_ptr": "*fp32", "zero_point_ptr": "*i8"},
        GRID | {"BLOCK_N": 8, "BLOCK_WORDS": 16},
        TARGETS,
    ),
    (
        "search_clip",
        search_clip._search_clip_kernel,
        {
            "weight_ptr": "*bf16",
            "column_weight_ptr": "*fp32",
            "ratios_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "zero_point_ptr": "*i8",
        },
        GRID | {"DTYPE": 2, "WEIGHTED": True, "BLOCK_N": 8, "BLOCK_COLUMNS": 128},
        TARGETS,
    ),
    (
        "dequantize_packed",
        dequantize._dequantize_kernel,
        {"codes_ptr": "*i32", "scale_ptr": "*bf16", "zero_point_ptr": "*i8", "out_ptr": "*bf16"},
        {"BITS": 4, "PER_WORD": 8, "WHOLE_WORDS": True, "HAS_ZERO_POINT": True, "BLOCK_WORDS": 128},
        TARGETS,
    ),
    (
        "dequantize",
        dequantize._dequantize_kernel,
        {"codes_ptr": "*i8", "scale_ptr": "*bf16", "zero_point_ptr": "*i8", "out_ptr": "*bf16"},
        {"BITS": 8, "PER_WORD": 1, "WHOLE_WORDS": True, "HAS_ZERO_POINT": True, "BLOCK_WORDS": 1024},
        TARGETS,
    ),
    (
        "quantize_tokens",
        int8_matmul._quantize_tokens_kernel,
        {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32"},
        {"BLOCK": 2048},
        TARGETS,
    ),
    (
        "quantize_fp8",
        fp8_matmul._quantize_fp8_kernel,
        {"x_ptr": "*bf16", "codes_ptr": "*u8", "scale_ptr": "*fp32"},
        {"SMALLEST": 1e-12, "BLOCK_K": 128, "num_warps": 1},
        TARGETS,
    ),
    ("int4_matmul", int4_matmul._int4_matmul_kernel, INT4, int4(MANY, torch.bfloat16), TARGETS),
    ("int4_decode", int4_matmul._int4_matmul_kernel, INT4, int4(ONE, torch.bfloat16), ("sm_90", "gfx942")),
    (
        "int4_matmul_float32",
        int4_matmul._int4_matmul_kernel,
        INT4 | {"x_ptr": "*fp32"},
        int4(MANY, torch.float32),
        ("sm_80", "gfx942"),
    ),
    ("int8_matmul", int8_matmul._int8_matmul_kernel, INT8, int8_matmul.launch_options(MANY), TARGETS),
    ("int8_decode", int8_matmul._int8_matmul_kernel, INT8, int8_matmul.launch_options(ONE), ("sm_90", "gfx942")),
    ("fp8_blocks", fp8_matmul._fp8_matmul_kernel, FP8, fp8(MANY, True, True), NATIVE_FP8),
    ("fp8_channels_decode", fp8_matmul._fp8_matmul_kernel, FP8, fp8(ONE, True, False), NATIVE_FP8),
    ("fp8_blocks_emulated", fp8_matmul._fp8_matmul_kernel, FP8_BYTES, fp8(MANY, False, True), EMULATED_FP8),
    ("fp8_channels_emulated", fp8_matmul._fp8_matmul_kernel, FP8_BYTES, fp8(ONE, False, False), EMULATED_FP8),
]


@pytest.mark.parametrize(("case", "target"), [pytest.param(b, t, id=f"{b[0]}-{t}") for b in BUILDS for t in b[4]])
def test_builds(case, target, tmp_path, monkeypatch):
    _, kernel, pointers, values, _ = case
    build(kernel, pointers, values, target, tmp_path, monkeypatch)
