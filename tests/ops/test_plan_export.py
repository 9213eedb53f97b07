"""Exports of a plan, against the option names of the projects that read them (plan_options/*.json, made by extract.py)."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import header_models as models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.cluster import load_cluster
from tersor.formats.errors import TersorError
from tersor.ops.plan_parallel.export import common, styles
from tersor.ops.plan_parallel.export.common import Export, Unsupported
from tersor.ops.plan_parallel.export.megatron import pipeline_layout
from tersor.ops.plan_parallel.export.write import EXPORTERS, exports, summary, write_exports
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload

OPTIONS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "plan_options").glob("*.json")}
TRAIN, SERVE = Workload(global_batch=256), Workload(mode="serve")
QWEN3 = models.LLAMA_8B | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "num_hidden_layers": 36,
    "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "vocab_size": 256,
}  # fmt: skip


def gpt2_shapes() -> dict:
    shapes = {
        "transformer.wte.weight": (256, 64),
        "transformer.wpe.weight": (128, 64),
        "transformer.ln_f.weight": (64,),
    }
    for layer in range(2):
        block = f"transformer.h.{layer}"
        shapes |= {f"{block}.attn.c_attn.weight": (64, 192), f"{block}.attn.c_proj.weight": (64, 64)}
        shapes |= {f"{block}.mlp.c_fc.weight": (64, 256), f"{block}.mlp.c_proj.weight": (256, 64)}
    return shapes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """PlanModel of a published model by name; each is made once."""
    made = {}
    of = {
        "llama": (models.LLAMA_8B, models.llama_shapes),
        "llama-405b": (models.LLAMA_405B, models.llama_shapes),
        "qwen3": (QWEN3, models.llama_shapes),
        "mixtral": (models.MIXTRAL, models.llama_shapes),
        "deepseek": (models.DEEPSEEK_V3, models.deepseek_shapes),
        "gpt2": (GPT2, lambda _: gpt2_shapes()),
    }

    def make(name: str) -> PlanModel:
        if name not in made:
            config, shapes = of[name]
            made[name] = PlanModel(
                Checkpoint(models.write_model(tmp_path_factory.mktemp(name) / "m", config, shapes(config)))
            )
        return made[name]

    return make


def export(
    name: str, model: PlanModel, layout: Layout, workload: Workload = TRAIN, cluster: str = "4x8xh100"
) -> Export:
    return EXPORTERS[name](model, layout, workload, load_cluster(cluster))


def arrays(script: str) -> list[str]:
    """The words of all bash arrays of a script."""
    return [
        word
        for body in re.findall(r"^\w+=\(\n(.*?)^\)", script, re.MULTILINE | re.DOTALL)
        for word in shlex.split(body)
    ]


def parser(project: str) -> argparse.ArgumentParser:
    """A command line that takes what the project's own does: unknown names, missing values and wrong words are errors."""
    made = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for name, takes in OPTIONS[project]["options"].items():
        kind = {"nothing": {"action": "store_true"}, "many": {"nargs": "+"}, "one": {}}
        made.add_argument(name, **(kind[takes] if isinstance(takes, str) else {"choices": takes}))
    return made


def parsed(project: str, words: list[str]) -> argparse.Namespace:
    found, unknown = parser(project).parse_known_args(words)
    assert not unknown
    return found


# --- Megatron-LM ------------------------------------------------------------------------------------------------------

MEGATRON = [
    ("llama", Layout(tp=2, pp=4, dp=2, zero=1, stages=(7, 9, 9, 7))),
    ("llama", Layout(tp=4, pp=2, dp=2, cp=2, zero=1, schedule="interleaved", chunks=2, recompute="full", replicate=2)),
    ("llama", Layout(dp=8, zero=3, recompute="attention")),
    ("llama", Layout(dp=8, zero=1, offload="optimizer")),
    ("qwen3", Layout(tp=8, zero=0, schedule="gpipe", pp=4)),
    ("mixtral", Layout(tp=2, pp=2, dp=4, ep=4, etp=2, zero=2)),
    ("deepseek", Layout(tp=1, pp=4, dp=8, ep=8, zero=1)),
    ("gpt2", Layout(dp=2)),
]


@pytest.mark.parametrize(
    ("name", "layout"), MEGATRON, ids=lambda value: value if isinstance(value, str) else value.describe()
)
def test_megatron_takes_the_arguments(name, layout, model, tmp_path):
    script = export("megatron", model(name), layout).files["megatron.sh"]
    found = parsed("megatron", arrays(script))
    assert int(found.tensor_model_parallel_size) == layout.tp
    assert int(found.pipeline_model_parallel_size) == layout.pp
    assert int(found.context_parallel_size) == layout.cp
    assert found.sequence_parallel == (layout.tp > 1)
    assert int(found.num_layers) == model(name).facts.layers
    assert int(found.micro_batch_size) * layout.dp * layout.micro_batches(256) == int(found.global_batch_size) == 256
    assert found.use_megatron_fsdp == (layout.zero > 1)
    (tmp_path / "run.sh").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "run.sh"], check=True)


def test_megatron_models_have_their_sizes(model):
    mixtral = parsed(
        "megatron", arrays(export("megatron", model("mixtral"), Layout(dp=8, ep=8, zero=1)).files["megatron.sh"])
    )
    assert (mixtral.num_experts, mixtral.moe_router_topk, mixtral.num_query_groups) == ("8", "2", "8")
    assert (mixtral.expert_model_parallel_size, mixtral.expert_tensor_parallel_size) == ("8", "1")
    deepseek = parsed(
        "megatron", arrays(export("megatron", model("deepseek"), Layout(dp=8, ep=8, zero=1)).files["megatron.sh"])
    )
    assert deepseek.multi_latent_attention
    assert (deepseek.kv_lora_rank, deepseek.q_lora_rank) == ("512", "1536")
    assert deepseek.moe_layer_freq == "([0]*3+[1]*58)"


def unrolled(text: str) -> list[str]:
    """Stages of a layout string, as Megatron-LM's help tells how to read it: commas mean nothing, groups and letters repeat."""
    text = text.replace(",", "")
    text = re.sub(r"\(([^)]+)\)\*(\d+)", lambda found: found[1] * int(found[2]), text)
    return re.sub(r"(.)\*(\d+)", lambda found: found[1] * int(found[2]), text).split("|")


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 14), min_size=1, max_size=24))
def test_layout_string_says_the_stages(stages):
    text = pipeline_layout(tuple(stages))
    assert set(re.findall(r"[A-Za-z]", text)) <= set(OPTIONS["megatron"]["pipeline layout letters"])
    found = unrolled(text)
    assert [stage.count("t") for stage in found] == stages
    assert found[0].startswith("E") and found[-1].endswith("L")
    assert "".join(found).count("E") == "".join(found).count("L") == 1


def test_layout_string_is_short():
    assert pipeline_layout((3, *[4] * 30, 3)) == "Ettt|(tttt|)*30,tttL"


# --- torchtitan -------------------------------------------------------------------------------------------------------

TITAN = [
    ("llama", Layout(tp=2, pp=2, dp=2, zero=3, stages=(15, 17))),
    ("llama", Layout(dp=8, replicate=2, zero=2, recompute="attention")),
    ("llama-405b", Layout(tp=8, pp=2, dp=2, cp=2, zero=2, schedule="zbv", chunks=2, stages=(31, 32, 32, 31), recompute="full")),
    ("qwen3", Layout(dp=4, zero=3)),
    ("mixtral", Layout(dp=8, ep=4, zero=3)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layout"), TITAN, ids=lambda value: value if isinstance(value, str) else value.describe()
)
def test_torchtitan_takes_the_flags(name, layout, model):
    options = OPTIONS["torchtitan"]["options"]
    result = export("torchtitan", model(name), layout)
    lines = result.files["torchtitan.flags"].splitlines()
    *flags, policy = lines[2:]
    assert policy.removeprefix("activation-checkpoint:") in OPTIONS["torchtitan"]["activation checkpoint"]
    module, config = (line.split()[1] for line in lines[:2])
    assert config in OPTIONS["torchtitan"]["configs"][module]
    given_flags = dict(line.removeprefix("--").split(" ", 1) if " " in line else (line[2:], True) for line in flags)
    for option, value in given_flags.items():
        takes = options[option]
        assert value in takes if isinstance(takes, list) else (value is True) == (takes == "nothing"), option
    degrees = {key.removesuffix("_degree"): int(value) for key, value in given_flags.items() if key.endswith("_degree")}
    world = 1
    for axis in (
        "data_parallel_replicate",
        "data_parallel_shard",
        "tensor_parallel",
        "context_parallel",
        "pipeline_parallel",
    ):
        world *= degrees[f"parallelism.{axis}"]
    assert world == layout.world
    tokens = int(given_flags["training.num_tokens_per_microbatch_per_dp_rank"])
    step = tokens * layout.dp * int(given_flags.get("parallelism.num_pp_microbatches", 1))
    assert int(given_flags["training.num_tokens_per_train_step"]) % step == 0


@pytest.mark.parametrize(
    ("name", "layout"), TITAN, ids=lambda value: value if isinstance(value, str) else value.describe()
)
def test_torchtitan_function_sets_what_exists(name, layout, model):
    tree = ast.parse(export("torchtitan", model(name), layout).files["torchtitan_plan.py"])
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported - set(OPTIONS["torchtitan"]["policies"]) <= {
        name for names in OPTIONS["torchtitan"]["configs"].values() for name in names
    }
    for node in function.body[1:-1]:
        option = ast.unparse(node.targets[0]).removeprefix("config.")
        assert option in OPTIONS["torchtitan"]["options"]
        if option == "parallelism.module_fqns_per_model_part":
            parts = ast.literal_eval(node.value)
            assert len(parts) == layout.pp * layout.chunks
            names = [name for part in parts for name in part if name != "rotary_emb"]
            blocks = [f"layers.{index}" for index in range(model(name).facts.layers)]
            assert names == ["tok_embeddings", *blocks, "norm", "lm_head"]


def test_torchtitan_takes_other_models_from_transformers(model):
    flags = export("torchtitan", model("mixtral"), Layout(dp=8, zero=3)).files["torchtitan.flags"]
    assert (
        "--module transformers_modeling_backend" in flags and f"--hf_model {model('mixtral').checkpoint.path}" in flags
    )


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", Layout(dp=8, zero=3, offload="states", tier="nvme", recompute="full")),
        ("llama", Layout(dp=8, zero=3, replicate=2)),
        ("llama", Layout(dp=4, tp=2, zero=2)),
        ("llama", Layout(dp=4, zero=1, offload="optimizer")),
        ("mixtral", Layout(dp=8, ep=8, zero=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.describe(),
)
def test_deepspeed_knows_every_key(name, layout, model):
    found = json.loads(export("deepspeed", model(name), layout).files["ds_config.json"])
    sections, keys = OPTIONS["deepspeed"]["options"], OPTIONS["deepspeed"]["keys"]
    models_of = {"zero_optimization", "tensor_parallel", "expert_parallel"}

    def check(settings: dict, path: str) -> None:
        for key, value in settings.items():
            if path.partition(".")[0] in models_of:
                assert f"{path}.{key}" in sections
            else:
                assert key in (*keys, *models_of), key
            if isinstance(value, dict):
                check(value, f"{path}.{key}".lstrip("."))

    check(found, "")
    accumulated = found["gradient_accumulation_steps"] * found["train_micro_batch_size_per_gpu"] * layout.dp
    assert accumulated == found["train_batch_size"] == 256
    assert found["zero_optimization"]["stage"] == layout.zero
    if layout.replicate > 1:
        assert found["zero_optimization"]["mics_shard_size"] == 4


# --- vLLM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", Layout(tp=2, pp=3, stages=(11, 11, 10))),
        ("llama", Layout(tp=8, pp=2)),
        ("mixtral", Layout(tp=2, dp=4, ep=8)),
        ("mixtral", Layout(tp=8, dp=4, ep=32)),
    ],
)
def test_vllm_takes_the_arguments(name, layout, model, tmp_path):
    script = export("vllm", model(name), layout, SERVE).files["vllm.sh"]
    command = script[script.index("vllm serve") :].replace("\\\n", " ").replace('"$@"', "")
    found = parsed("vllm", shlex.split(command)[3:])
    assert int(found.tensor_parallel_size) == layout.tp and int(found.data_parallel_size) == layout.dp
    assert found.enable_expert_parallel == (layout.ep > 1)
    set_in_environment = dict(re.findall(r"^export (\w+)=(.*)$", script, re.MULTILINE))
    assert set(set_in_environment) <= set(OPTIONS["vllm"]["environment"])
    if layout.pp == 3:
        assert set_in_environment["VLLM_PP_LAYER_PARTITION"] == "11,11,10"
    (tmp_path / "run.sh").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "run.sh"], check=True)


def test_vllm_starts_one_server_for_each_instance_of_a_mixture(model):
    """Data-parallel ranks of one vLLM share their experts, those of several instances do not."""
    found = export("vllm", model("mixtral"), Layout(tp=2, pp=2, dp=6, ep=4), SERVE)
    assert "--data-parallel-size 2" in found.files["vllm.sh"] and "3 equal servers" in found.notes[0]
    assert not export("vllm", model("mixtral"), Layout(tp=2, dp=4, ep=8), SERVE).notes


# --- transformers and FSDP2 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "workload"),
    [
        ("llama", Layout(tp=4, dp=2, zero=3), TRAIN),
        ("qwen3", Layout(tp=4, pp=2), SERVE),
        ("mixtral", Layout(tp=2, dp=4, ep=4, zero=3), TRAIN),
        ("mixtral", Layout(tp=2, etp=2), SERVE),
        ("deepseek", Layout(dp=8, ep=8, replicate=1, zero=3), TRAIN),
    ],
)
def test_transformers_takes_the_settings(name, layout, workload, model):
    from transformers.distributed import DistributedConfig

    files = export("huggingface", model(name), layout, workload).files
    settings = json.loads(files["tp_plan.json"])
    assert set(settings) <= set(OPTIONS["transformers"]["options"])
    for plan in ("tp_plan", "ep_plan"):
        assert set(settings.get(plan, {}).values()) <= set(OPTIONS["transformers"]["styles"])
    made = DistributedConfig(**settings)
    assert made.tp_size * made.pp_size * made.dp_size == layout.world
    ast.parse(files["huggingface_load.py"])


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "deepseek_v3", "gemma3_text", "phi3", "gpt2"])
def test_plans_are_those_of_the_configuration_classes(family):
    from transformers import AutoConfig

    made = type(AutoConfig.for_model(family))
    assert styles.family_plans(family) == (made.base_model_tp_plan or {}, made.base_model_ep_plan or {})


def test_styles_name_modules_of_the_model(model):
    found = styles.styles(model("qwen3")).tensor
    assert found["model.layers.*.self_attn.q_proj"] == "colwise"
    assert found["model.layers.*.self_attn.q_norm"] == "replicated_with_grad_allreduce"
    assert found["model.embed_tokens"] == "embedding_rowwise" and found["lm_head"] == "colwise_gather_output"
    assert not any("experts" in name for name in styles.styles(model("mixtral"), etp=1).tensor)
    assert "model.layers.*.mlp.experts.gate_up_proj" in styles.styles(model("mixtral"), etp=2).tensor


def test_styles_by_name_where_transformers_has_none(model, monkeypatch):
    monkeypatch.setattr(styles, "family_plans", lambda family: ({}, {}))
    found = styles.styles(model("llama"))
    assert "attention stays whole" in found.source and not any("self_attn" in name for name in found.tensor)
    assert found.tensor["model.layers.*.mlp.down_proj"] == "rowwise"
    assert found.tensor["model.layers.*.mlp.up_proj"] == "colwise"


def test_fsdp2_file_has_the_plan(model):
    layout = Layout(tp=2, pp=2, dp=2, zero=2, stages=(15, 17))
    text = export("fsdp2", model("llama"), layout).files["fsdp2_plan.py"]
    tree = ast.parse(text)
    plan = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "PLAN"
    )
    assert (plan["tp"], plan["pp"], plan["dp"], plan["stages"], plan["micro_batches"]) == (2, 2, 2, [15, 17], 128)
    assert plan["blocks"] == "model.layers"
    assert "tersor." not in text


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "layout", "words"),
    [
        ("megatron", Layout(pp=2, schedule="zbv", chunks=2), "zbv"),
        ("megatron", Layout(dp=2, zero=3, offload="states"), "optimizer states"),
        ("torchtitan", Layout(dp=2, zero=1), "zero=2"),
        ("torchtitan", Layout(pp=2, schedule="zb-h1"), "zbv"),
        ("torchtitan", Layout(pp=2, dp=2, schedule="zbv", chunks=2, zero=3), "lose gradients"),
        ("deepspeed", Layout(pp=2), "no pipeline"),
        ("deepspeed", Layout(dp=4, replicate=2, zero=2), "zero=3"),
        ("deepspeed", Layout(cp=2), "Ulysses"),
        ("fsdp2", Layout(tp=16), "8 heads of keys"),
        ("fsdp2", Layout(cp=2, dp=2), "cp=2"),
        ("fsdp2", Layout(pp=2, dp=2, schedule="zb-h1", zero=3), "lose gradients"),
        ("huggingface", Layout(pp=2), "one stage at a time"),
        ("vllm", Layout(tp=2), "serves"),
    ],
)
def test_what_a_runtime_cannot_do_is_said(runtime, layout, words, model):
    with pytest.raises(Unsupported, match=words) as raised:
        export(runtime, model("llama"), layout)
    assert raised.value.reasons and raised.value.hint


def test_ranks_that_fill_no_node(model):
    with pytest.raises(TersorError, match="12 ranks"):
        export("megatron", model("llama"), Layout(dp=4, tp=3, zero=1), Workload(global_batch=12))


def test_all_exports_of_a_plan_are_written(model, tmp_path):
    layout = Layout(tp=2, pp=2, dp=2, zero=2, stages=(15, 17))
    found = write_exports(tmp_path, model("llama"), layout, TRAIN, load_cluster("8xh100"))
    assert set(found) == set(EXPORTERS)
    told = summary(found)
    assert told["vllm"]["unsupported"] and told["deepspeed"]["unsupported"]
    for name in ("megatron", "torchtitan", "fsdp2"):
        assert sorted(path.name for path in (tmp_path / "exports" / name).iterdir()) == told[name]["files"]
    assert not (tmp_path / "exports" / "vllm").exists()
    assert (tmp_path / "exports" / "megatron" / "megatron.sh").stat().st_mode & 0o111
    json.dumps(told)


def test_a_batch_that_does_not_divide_is_said_for_each_runtime(model):
    found = exports(model("llama"), Layout(dp=3, zero=2), Workload(global_batch=256), load_cluster("8xh100"))
    assert "256" in found["megatron"].reasons[0]


def test_launches_of_one_node_and_several(model):
    one = export("megatron", model("llama"), Layout(dp=4, zero=1)).files["megatron.sh"]
    assert "torchrun --standalone --nproc-per-node 4" in one
    four = export("megatron", model("llama"), Layout(dp=32, zero=1)).files["megatron.sh"]
    assert "torchrun --nnodes 4 --nproc-per-node 8" in four
    assert common.nodes_of(Layout(dp=8), load_cluster("4x8xh100")) == (1, 8)
