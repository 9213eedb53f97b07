import os
import subprocess
import sys

import pytest
import torch
from tersor.kernels.dispatch import backend, integer_range


def test_cpu_tensors_take_the_torch_path(monkeypatch):
    monkeypatch.delenv("TERSOR_KERNELS", raising=False)
    assert backend(torch.zeros(1)) == "torch"


def test_reference_can_be_forced(monkeypatch):
    monkeypatch.setenv("TERSOR_KERNELS", "reference")
    assert backend(torch.zeros(1)) == "reference"


def test_unknown_value_is_refused(monkeypatch):
    monkeypatch.setenv("TERSOR_KERNELS", "cuda")
    with pytest.raises(ValueError, match="TERSOR_KERNELS='cuda'"):
        backend(torch.zeros(1))


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TERSOR_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"GPU|not installed"):
        backend(torch.zeros(1))


def test_integer_range():
    assert integer_range(4) == (-8, 7)
    with pytest.raises(ValueError, match="bits"):
        integer_range(9)


def test_kernels_import_and_run_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from tersor.kernels import (
    active_matmul, bitmap_matmul, count_tiles, dequantize, dispatch, error_compensation, fp8_matmul, group_quantize,
    grouped_matmul, int4_matmul, int8_matmul, search_clip, semi_structured, sparse_index, tile_matmul
)
assert not dispatch.HAVE_TRITON
packed, scale, _ = group_quantize.quantize_and_pack(torch.ones(2, 32), 4, 32, True, torch.float32)
print(int4_matmul.int4_matmul(torch.ones(1, 32), packed, scale).shape)
"""
    env = {k: v for k, v in os.environ.items() if k != "TERSOR_KERNELS"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 2])" in result.stdout
