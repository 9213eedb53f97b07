"""Every kernel family on the device at hand: tersor's path, its plain-torch definition, what a user would take instead.

    python benchmarks/kernel_speed.py [--device cpu|cuda] [--rows 8192 --columns 8192]

The limit of a case is the time that its bytes take at the memory bandwidth of a copy, or its operations at the speed of
a large matrix product, whichever is longer; both are measured in the same run. int8 and 8-bit floats are given twice the
speed of bfloat16 on a GPU and that of float32 on a CPU. On a GPU caches are emptied before every run.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from measure import save
from tersor.kernels.dequantize import dequantize_packed, reference_dequantize, reference_unpack
from tersor.kernels.error_compensation import compensate
from tersor.kernels.fp8_matmul import fp8_matmul, quantize_fp8, reference_fp8_matmul, reference_quantize_fp8
from tersor.kernels.group_quantize import (
    group_quantize,
    quantize_and_pack,
    reference_group_quantize,
    reference_quantize_and_pack,
)
from tersor.kernels.group_range import minmax_scale, reference_minmax_scale
from tersor.kernels.int4_matmul import int4_matmul, reference_int4_matmul
from tersor.kernels.int8_matmul import int8_matmul, quantize_tokens, reference_int8_matmul, reference_quantize_tokens
from tersor.kernels.search_clip import RATIOS, reference_search_clip, search_clip

GROUP = 128
OURS = "tersor"


@dataclass
class Case:
    """`bytes` and `operations` are what the job needs at least; `runs` are the implementations by name."""

    family: str
    shape: str
    runs: dict[str, Callable[[], object]]
    bytes: int
    operations: int = 0
    dtype: torch.dtype = torch.float32


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call after one to warm up; on a CPU of 3 calls or more in half a second, of fewer after 2."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median") / 1e3
    run()
    times: list[float] = []
    while sum(times) < 0.5 or (len(times) < 3 and sum(times) < 2):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Limits:
    """Bandwidth of a copy, in bytes per second, and speed of a square matrix product in a dtype."""

    def __init__(self, device: torch.device):
        self.device, self._speeds = device, {}
        source = torch.ones((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)

    def speed(self, dtype: torch.dtype) -> float:
        """Operations per second; a multiplication and an addition are two."""
        cuda = self.device.type == "cuda"
        if dtype in (torch.int8, torch.float8_e4m3fn):
            return self.speed(torch.bfloat16) * 2 if cuda else self.speed(torch.float32)
        if dtype not in self._speeds:
            n = 8192 if cuda else 1536
            a, b = torch.randn(2, n, n, device=self.device).to(dtype)
            self._speeds[dtype] = 2 * n**3 / seconds_of(lambda: a @ b, self.device)
        return self._speeds[dtype]

    def seconds(self, case: Case) -> float:
        return max(case.bytes / self.bandwidth, case.operations / self.speed(case.dtype) if case.operations else 0.0)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def rounding_cases(device: torch.device, rows: int, columns: int) -> Iterator[Case]:
    """Weight to scales, codes and packed codes, and back."""
    weight = torch.randn(rows, columns, device=device).mul_(0.02).bfloat16()
    shape, n, scales = f"{rows}x{columns}", rows * columns, 2 * rows * columns // GROUP
    arguments = (weight, 4, GROUP, True, torch.bfloat16)
    yield Case(
        "group range",
        shape,
        {OURS: lambda: minmax_scale(*arguments), "reference": lambda: reference_minmax_scale(*arguments)},
        2 * n + scales,
    )
    scale, _ = minmax_scale(*arguments)
    codes = (weight, scale, None, 4, GROUP)
    yield Case(
        "group quantize",
        shape,
        {OURS: lambda: group_quantize(*codes), "reference": lambda: reference_group_quantize(*codes)}
        | compressed_tensors_quantize(weight, scale),
        2 * n + scales + n,
    )
    yield Case(
        "quantize and pack",
        shape,
        {OURS: lambda: quantize_and_pack(*arguments), "reference": lambda: reference_quantize_and_pack(*arguments)},
        2 * n + scales + n // 2,
    )
    yield Case(
        "search clip",
        shape,
        {OURS: lambda: search_clip(*arguments), "reference": lambda: reference_search_clip(*arguments)},
        2 * n + scales,
        # per ratio: multiply, round, two for the clamp, subtract, multiply-add (two)
        operations=7 * len(RATIOS) * n,
    )
    packed, _, _ = quantize_and_pack(*arguments)
    grid = (scale, None, 4, GROUP, (rows, columns), torch.bfloat16)
    yield Case(
        "dequantize",
        shape,
        {
            OURS: lambda: dequantize_packed(packed, *grid),
            "reference": lambda: reference_dequantize(
                reference_unpack(packed, 4, columns), scale, None, GROUP, torch.bfloat16
            ),
        }
        | compressed_tensors_dequantize(packed, scale, (rows, columns)),
        n // 2 + scales + 2 * n,
    )


def compressed_tensors_quantize(weight, scale):
    try:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import quantize
    except ImportError:
        return {}
    settings = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    zero = torch.zeros_like(scale, dtype=torch.int8)
    return {"compressed-tensors": lambda: quantize(weight, scale, zero, settings, dtype=torch.int8)}


def compressed_tensors_dequantize(packed, scale, shape):
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import dequantize
    except ImportError:
        return {}
    settings = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    size = torch.Size(shape)
    return {"compressed-tensors": lambda: dequantize(unpack_from_int32(packed, 4, size), scale, args=settings)}


def compensation_case(device: torch.device, rows: int, columns: int) -> Case:
    """GPTQ's loop; the reference walks over the columns as the paper's code does, with the same updates per block."""
    weight = torch.randn(rows, columns, device=device) * 0.02
    inputs = torch.randn(2 * columns, columns, device=device)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(inputs.t() @ inputs)), upper=True)
    scale, _ = minmax_scale(weight, 4, GROUP, True, torch.float32)

    def reference():
        with environment("TERSOR_KERNELS", "reference"):
            compensate(weight, factor, scale)

    return Case(
        "error compensation",
        f"{rows}x{columns}",
        {OURS: lambda: compensate(weight, factor, scale), "reference": reference},
        (4 + 4 + 1) * rows * columns + 4 * columns**2,
        rows * columns**2,
    )


def matmul_cases(device: torch.device, tokens: int, rows: int, columns: int) -> Iterator[Case]:
    """`[tokens, columns]` times a weight `[rows, columns]`. Activations are bfloat16, as they are in a model."""
    shape, n = f"{tokens}x{columns}x{rows}", rows * columns
    operations, out = 2 * tokens * n, 2 * tokens * rows
    x = torch.randn(tokens, columns, device=device).bfloat16()
    weight = torch.randn(rows, columns, device=device) / columns**0.5
    dense, wide, x_wide = weight.bfloat16(), weight.float(), x.float()
    plain = {"torch bfloat16": lambda: x @ dense.t()}
    if device.type == "cpu":
        plain["torch float32"] = lambda: x_wide @ wide.t()
    best = torch.bfloat16 if device.type == "cuda" else torch.float32

    packed, scale, _ = quantize_and_pack(weight, 4, GROUP, True, torch.bfloat16)
    yield Case(
        "int4 matmul",
        shape,
        {
            OURS: lambda: int4_matmul(x, packed, scale),
            "reference": lambda: reference_int4_matmul(x, packed, scale),
            **plain,
            **torch_int4(x, weight, scale),
        },
        n // 2 + 2 * n // GROUP + 2 * tokens * columns + out,
        operations,
        best,
    )
    codes, x_scale = quantize_tokens(x)
    weight_codes, weight_scale = quantize_tokens(weight)
    operands = (codes, weight_codes, x_scale, weight_scale)
    yield Case(
        "int8 matmul",
        shape,
        {
            OURS: lambda: int8_matmul(*operands),
            "reference": lambda: reference_int8_matmul(*operands),
            **plain,
            "torch._int_mm": lambda: (torch._int_mm(codes, weight_codes.t()) * x_scale * weight_scale.t()).bfloat16(),
        },
        n + tokens * columns + out,
        operations,
        torch.int8,
    )
    yield Case(
        "int8 tokens",
        f"{tokens}x{columns}",
        {OURS: lambda: quantize_tokens(x), "reference": lambda: reference_quantize_tokens(x)},
        3 * tokens * columns,
    )
    codes8, x_scale8 = quantize_fp8(x)
    weight8, weight_scale8 = quantize_fp8(weight)
    operands8 = (codes8, weight8, x_scale8, weight_scale8)
    yield Case(
        "fp8 matmul",
        shape,
        {
            OURS: lambda: fp8_matmul(*operands8),
            "reference": lambda: reference_fp8_matmul(*operands8),
            **plain,
            "torch._scaled_mm": lambda: torch._scaled_mm(
                codes8, weight8.t(), x_scale8, weight_scale8.t(), out_dtype=torch.bfloat16
            ),
        },
        n + tokens * columns + out,
        operations,
        torch.float8_e4m3fn,
    )
    yield Case(
        "fp8 tokens",
        f"{tokens}x{columns}",
        {OURS: lambda: quantize_fp8(x, 128), "reference": lambda: reference_quantize_fp8(x, 128)},
        3 * tokens * columns,
    )


def torch_int4(x, weight, scale):
    """torch's own 4-bit product, on codes packed its way."""
    codes = (group_quantize(weight, scale, None, 4, GROUP).int() + 8).contiguous()
    scale_and_zero = torch.stack((scale.t(), torch.zeros_like(scale.t())), 2).bfloat16().contiguous()
    if x.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
        multiply = torch.ops.aten._weight_int4pack_mm
    return {"torch int4": lambda: multiply(x, packed, GROUP, scale_and_zero)}


def cases(device: torch.device, rows: int, columns: int) -> Iterator[Case]:
    yield from rounding_cases(device, rows, columns)
    yield compensation_case(device, *(min(n, 4096 if device.type == "cuda" else 1024) for n in (rows, columns)))
    for tokens in (1, 16, 4096) if device.type == "cuda" else (1, 64):
        yield from matmul_cases(device, tokens, rows, columns)


def measure_case(case: Case, limits: Limits) -> list[dict]:
    """A row per implementation; one that this device or this version of torch lacks is named with the reason."""
    limit = limits.seconds(case)
    rows = []
    for name, run in case.runs.items():
        row = {"family": case.family, "shape": case.shape, "implementation": name}
        try:
            seconds = seconds_of(run, limits.device)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if name == OURS:
                raise
            rows.append(row | {"skipped": str(error).splitlines()[0]})
            continue
        row |= {"seconds": seconds, "gbps": case.bytes / seconds / 1e9, "share_of_limit": limit / seconds}
        if case.operations:
            row["tflops"] = case.operations / seconds / 1e12
        rows.append(row)
    ours = rows[0]["seconds"]
    return [row | ({"tersor_is_faster_by": row["seconds"] / ours} if "seconds" in row else {}) for row in rows]


def show(row: dict) -> str:
    name = f"{row['family']:20s}{row['shape']:17s}{row['implementation']:20s}"
    if "skipped" in row:
        return f"{name} not available here: {row['skipped']}"
    flops = f"{row['tflops']:10.2f}" if "tflops" in row else " " * 10
    return (
        f"{name}{row['seconds'] * 1e3:10.3f}{row['gbps']:9.1f}{flops}{row['share_of_limit']:9.0%}"
        f"{row['tersor_is_faster_by']:9.2f}"
    )


def rounded(row: dict) -> dict:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="of the weight; default 2048 on a CPU, 8192 on a GPU")
    parser.add_argument("--columns", type=int, help=f"a multiple of {GROUP}")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    usual = 2048 if device.type == "cpu" else 8192
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    torch.manual_seed(0)
    limits = Limits(device)
    dtypes = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if device.type == "cuda" else {})
    measured = {key: limits.speed(dtype) / 1e12 for key, dtype in dtypes.items()}
    print(f"{name}, {torch.get_num_threads()} threads: copy {limits.bandwidth / 1e9:.1f} GB/s", end="")
    print("".join(f", {key} product {value:.2f} TFLOP/s" for key, value in measured.items()))
    print(f"\n{'family':20s}{'shape':17s}{'implementation':20s}{'ms':>10s}{'GB/s':>9s}{'TFLOP/s':>10s}", end="")
    print(f"{'of limit':>9s}{'speedup':>9s}")
    rows: list[dict] = []
    for case in cases(device, arguments.rows or usual, arguments.columns or usual):
        found = measure_case(case, limits)
        print(*map(show, found), sep="\n", flush=True)
        rows += found
    content = {
        "device": name,
        "threads": torch.get_num_threads(),
        "copy_gbps": float(f"{limits.bandwidth / 1e9:.4g}"),
        "product_tflops": {key: float(f"{value:.4g}") for key, value in measured.items()},
        "rows": [rounded(row) for row in rows],
    }
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    print(f"written to {save(f'kernels-{slug}', content)}", file=sys.stderr)


if __name__ == "__main__":
    main()
