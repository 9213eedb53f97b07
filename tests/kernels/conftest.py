"""Runs kernels through Triton: natively where there is a GPU, else through the interpreter (TRITON_INTERPRET=1)."""

import os
from unittest import mock

import pytest
import torch


@pytest.fixture(scope="session")
def on_triton():
    """A function that calls a kernel's public function with its Triton implementation forced, on CPU tensors."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start of the process")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def move(value, where):
        if isinstance(value, torch.Tensor):
            return value.to(where)
        return tuple(move(v, where) for v in value) if isinstance(value, tuple) else value

    def call(function, *args, **kwargs):
        with mock.patch.dict(os.environ, TERSOR_KERNELS="triton"):
            result = function(*(move(a, device) for a in args), **{k: move(v, device) for k, v in kwargs.items()})
        return move(result, "cpu")

    return call
