"""Every Triton kernel builds ahead of time for each GPU generation we support; no GPU is needed."""

import pytest

triton = pytest.importorskip("triton")

from tersor.kernels import (  # noqa: E402
    dequantize,
    error_compensation,
    fp8_matmul,
    group_quantize,
    int4_matmul,
    int8_matmul,
    search_clip,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}

# Kernel, types of its pointers (every other argument is an i32), compile-time values, options.
KERNELS = {
    "compensate": (
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
    ),
    "group_quantize": (
        group_quantize._group_quantize_kernel,
        {"weight_ptr": "*bf16", "scale_ptr": "*bf16", "zero_point_ptr": "*i8", "out_ptr": "*i8"},
        {"LOW": -8, "HIGH": 7, "HAS_ZERO_POINT": True, "BLOCK": 512},
    ),
    "quantize_and_pack": (
        group_quantize._quantize_and_pack_kernel,
        {"weight_ptr": "*bf16", "packed_ptr": "*i32", "scale_ptr": "*fp32", "zero_point_ptr": "*i8"},
        {"EPS": 0.0078125, "BITS": 4, "SYMMETRIC": False, "DTYPE": 1, "WORDS": 16},
    ),
    "search_clip": (
        search_clip._search_clip_kernel,
        {
            "weight_ptr": "*bf16",
            "column_weight_ptr": "*fp32",
            "ratios_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "zero_point_ptr": "*i8",
        },
        {
            "EPS": 0.0078125,
            "BITS": 4,
            "SYMMETRIC": False,
            "DTYPE": 2,
            "WEIGHTED": True,
            "BLOCK_N": 8,
            "BLOCK_COLUMNS": 128,
        },
    ),
    "dequantize": (
        dequantize._dequantize_kernel,
        {"codes_ptr": "*i32", "scale_ptr": "*bf16", "zero_point_ptr": "*i8", "out_ptr": "*bf16"},
        {"BITS": 4, "PACKED": True, "HAS_ZERO_POINT": True, "BLOCK": 512},
    ),
    "int4_matmul": (
        int4_matmul._int4_matmul_kernel,
        {"x_ptr": "*bf16", "packed_ptr": "*i32", "scale_ptr": "*bf16", "zero_point_ptr": "*i8", "out_ptr": "*fp32"},
        {"HAS_ZERO_POINT": True, "DOT": triton.language.bfloat16, **TILE},
    ),
    "int8_matmul": (
        int8_matmul._int8_matmul_kernel,
        {
            "x_ptr": "*i8",
            "weight_ptr": "*i8",
            "x_scale_ptr": "*fp32",
            "weight_scale_ptr": "*bf16",
            "out_ptr": "*bf16",
        },
        TILE,
    ),
    "quantize_tokens": (
        int8_matmul._quantize_tokens_kernel,
        {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32"},
        {"BLOCK": 1024},
    ),
    "fp8_matmul": (
        fp8_matmul._fp8_matmul_kernel,
        {
            "x_ptr": "*u8",
            "weight_ptr": "*u8",
            "x_scale_ptr": "*fp32",
            "weight_scale_ptr": "*bf16",
            "out_ptr": "*bf16",
        },
        {"NATIVE": False, "BLOCKWISE": True, **TILE},
    ),
    "quantize_fp8": (
        fp8_matmul._quantize_fp8_kernel,
        {"x_ptr": "*bf16", "codes_ptr": "*u8", "scale_ptr": "*fp32"},
        {"SMALLEST": 1e-12, "BLOCK_K": 128},
    ),
}


def build(kernel, pointers, constants, target):
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    assert set(pointers) | set(constants) <= set(kernel.arg_names)
    return triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_builds(name, target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a cached binary would prove nothing
    compiled = build(*KERNELS[name], target)
    assert compiled.asm["hsaco" if target == "gfx942" else "cubin"]


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_builds_native_fp8(target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, pointers, constants = KERNELS["fp8_matmul"]
    pointers = pointers | {"x_ptr": "*fp8e4nv", "weight_ptr": "*fp8e4nv"}
    assert build(kernel, pointers, constants | {"NATIVE": True, "BLOCKWISE": False}, target).asm["cubin"]
