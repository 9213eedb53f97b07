"""The kernels of distillation build ahead of time for each GPU generation we support; no GPU is needed."""

import pytest

triton = pytest.importorskip("triton")

from ahead_of_time import TARGETS, build  # noqa: E402
from tersor.kernels import adam8bit, divergence, gated_activation, perturb  # noqa: E402

ROWS = {"student_ptr": "*fp32", "teacher_ptr": "*fp32", "losses_ptr": "*fp32", "numbers_ptr": "*fp32"}
GATED = {"g_ptr": "*bf16", "u_ptr": "*bf16", "out_ptr": "*bf16"}
CHAIN = {"x_ptr": "*bf16", "bias_ptr": "*bf16", "keep_ptr": "*u8", "out_ptr": "*bf16", "slope_ptr": "*bf16"}
STEP = {
    "weight_ptr": "*bf16",
    "gradient_ptr": "*bf16",
    "m_codes_ptr": "*u8",
    "v_codes_ptr": "*u8",
    **{f"{name}_ptr": "*fp32" for name in ("m_absmax", "v_absmax", "m_entries", "m_middles", "v_entries", "v_middles")},
    "numbers_ptr": "*fp32",
}
MOVE = {"out_ptr": "*bf16", "source_ptr": "*bf16", "scale": "fp32", "low": "fp32", "high": "fp32"}


def rows(weights, teacher):
    return divergence.launch_options(151_936, weights, teacher)


SOME = ("sm_90", "gfx942")

# Name, kernel, types of its pointers and floats (every other argument is an i32), compile-time values and options, targets.
BUILDS = [
    (
        "divergence",
        divergence._divergence_kernel,
        ROWS | {"labels_ptr": "*i64"},
        rows({"forward_kl": 1.0, "next_token": 1.0}, True),
        TARGETS,
    ),
    ("logit_mse", divergence._divergence_kernel, ROWS | {"labels_ptr": "*fp32"}, rows({"logit_mse": 1.0}, True), SOME),
    (
        "next_token",
        divergence._divergence_kernel,
        ROWS | {"labels_ptr": "*i64"},
        rows({"next_token": 1.0}, False),
        SOME,
    ),
    (
        "gated",
        gated_activation._gated_kernel,
        GATED | {"g_slope_ptr": "*bf16", "u_slope_ptr": "*bf16"},
        {"KIND": 0, "SAVE": True, "BLOCK": 1024},
        TARGETS,
    ),
    (
        "gated_backward",
        gated_activation._gated_backward_kernel,
        GATED | {"u_gradient_ptr": "*bf16", "product_ptr": "*bf16"},
        {"KIND": 2, "PRODUCT": True, "BLOCK": 1024},
        TARGETS,
    ),
    (
        "activation",
        gated_activation._activation_kernel,
        CHAIN | {"scale": "fp32"},
        {"KIND": 1, "HAS_BIAS": True, "HAS_KEEP": True, "SAVE": True, "BLOCK": 1024},
        TARGETS,
    ),
    ("adam8bit", adam8bit._adam8bit_kernel, STEP, {"BLOCK": adam8bit.BLOCK, "num_warps": 2}, TARGETS),
    ("perturb", perturb._perturb_kernel, MOVE, {"FILL": False, "BLOCK": 256}, TARGETS),
    ("normal", perturb._perturb_kernel, MOVE | {"out_ptr": "*fp32"}, {"FILL": True, "BLOCK": 256}, SOME),
]


@pytest.mark.parametrize(("case", "target"), [pytest.param(b, t, id=f"{b[0]}-{t}") for b in BUILDS for t in b[4]])
def test_builds(case, target, tmp_path, monkeypatch):
    _, kernel, types, values, _ = case
    build(kernel, types, values, target, tmp_path, monkeypatch)


def test_normal_numbers_are_built_without_fused_operations():
    """As `perturb` launches it, so that a GPU rounds each operation as the CPU does."""
    kernel, constants = perturb._perturb_kernel, {"FILL": True, "BLOCK": 256}
    types = MOVE | {"seed": "i64", "first": "i64"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    counts = {}
    for fused in (True, False):
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = triton.compile(source, target=TARGETS["sm_90"][0], options={"enable_fp_fusion": fused})
        counts[fused] = built.asm["ptx"].count("fma.rn.f32")
    assert counts[True] > 0
    assert counts[False] == 0
