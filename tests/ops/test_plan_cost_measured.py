"""Times of `profile --measure` in place of the roofline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from header_models import LLAMA_8B, llama_shapes, write_model
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.cluster import load_cluster
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.cost.measured import read_measured
from tersor.ops.plan_parallel.cost.step import Costs
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

CONFIG = LLAMA_8B | {"num_hidden_layers": 2}
CLUSTER = load_cluster("2xh100")
MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PlanModel:
    return PlanModel(Checkpoint(write_model(tmp_path_factory.mktemp("model"), CONFIG, llama_shapes(CONFIG))))


def report(folder: Path, device: str = "NVIDIA H100 80GB HBM3", modules=MODULES) -> Path:
    """Every product 1 ms, attention 4 ms, the rest of a block 2 ms, on 1,024 tokens."""
    rows = [{"name": name, "count": 2, "seconds": 1e-3, "total_seconds": 2e-3} for name in modules]
    rows += [
        {"name": "scores and values", "count": 2, "seconds": 4e-3, "total_seconds": 8e-3},
        {"name": "norms", "count": 2, "seconds": 1e-3, "total_seconds": 2e-3},
        {"name": "element-wise and the rest", "count": 2, "seconds": 1e-3, "total_seconds": 2e-3},
    ]
    measure = {
        "device": {"name": device, "type": "cuda"},
        "host": {"name": "this machine"},
        "workload": {"batch": 1, "prompt": 1024, "generate": 0},
        "operators": {"prompt": {"tokens": 1024, "rows": rows}, "step": None},
    }
    path = folder / "report.json"
    path.write_text(json.dumps({"quality": {"models": [{"measure": measure}]}}))
    return path


def block_seconds(model: PlanModel, measured, layout: Layout, seq_len: int = 1024) -> float:
    workload = Workload(global_batch=4, seq_len=seq_len)
    costs = Costs(model, CLUSTER, Links(CLUSTER), workload, measured=measured)
    return costs.piece(model.signatures[1], layout).forward


def test_a_block_takes_what_was_measured(model, tmp_path):
    measured = read_measured(report(tmp_path), model, CLUSTER.hardware)
    floor = 8 * 7e-6  # eight kernels are started
    assert block_seconds(model, measured, Layout()) == pytest.approx(13e-3 + floor)
    assert block_seconds(model, measured, Layout(tp=2)) == pytest.approx(6.5e-3 + floor)
    # twice as many tokens: four times as many pairs
    pairs = 2048 * 2049 / (1024 * 1025)
    assert block_seconds(model, measured, Layout(), 2048) == pytest.approx(2 * 9e-3 + pairs * 4e-3 + floor)


def test_reports_of_other_models_devices_and_commands_are_refused(model, tmp_path):
    with pytest.raises(TersorError, match="measured on Some CPU, the cluster has H100"):
        read_measured(report(tmp_path, "Some CPU"), model, CLUSTER.hardware)
    with pytest.raises(TersorError, match="none of its operators"):
        read_measured(report(tmp_path, modules=("c_attn",)), model, CLUSTER.hardware)
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"quality": {}}))
    with pytest.raises(TersorError, match="no report of measured operators"):
        read_measured(path, model, CLUSTER.hardware)
    with pytest.raises(TersorError, match="No such file"):
        read_measured(tmp_path / "absent.json", model, CLUSTER.hardware)
    this = replace(CLUSTER.hardware, name="this machine")
    assert read_measured(report(tmp_path, "Some CPU"), model, this).device == "Some CPU"
