"""Building a Triton kernel for a GPU that is not there."""

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

# Target, bytes of shared memory that one program may have.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


def build(kernel, pointers, values, target, tmp_path, monkeypatch):
    """Compile `kernel` for `target` and check that its binary fits the GPU's shared memory.

    `pointers` are the types of its pointers (every other argument is an i32), `values` compile-time values and options.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a cached binary would prove nothing
    options = {name: values[name] for name in ("num_warps", "num_stages") if name in values}
    constants = {name: value for name, value in values.items() if name not in options}
    assert set(pointers) | set(constants) <= set(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    # As at a launch with aligned tensors and round shapes: loads become vectors, and their buffers take shared memory.
    aligned = [i for i, name in enumerate(kernel.arg_names) if name not in constants]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu, shared_memory = TARGETS[target]
    compiled = triton.compile(source, target=gpu, options=options)
    assert compiled.asm["hsaco" if target == "gfx942" else "cubin"]
    assert compiled.metadata.shared <= shared_memory
