"""Models cut by real rules: what ranks hold, files for each, and the way back to the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch
from header_models import write_layout
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.shards import ShardIndex
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.shards.layout import Placement, chunk
from tersor.ops.plan_parallel.shards.verify import verify_shards
from tersor.ops.plan_parallel.shards.write import write_shards
from tersor.ops.plan_parallel.transform.rules import rules


def together(folder) -> dict[str, torch.Tensor]:
    """The whole tensors, put together from what the files hold, without the code that cut them."""
    index = ShardIndex.load(folder)
    files = [load_file(folder / name) for name in index.files]
    whole = {}
    for name, tensor in index.tensors.items():
        if tensor.pieces:
            whole[name] = torch.empty(tensor.shape, dtype=files[tensor.pieces[0].file][name].dtype)
        for piece in tensor.pieces:
            local = files[piece.file][name]
            for d, (start, stop) in enumerate(piece.box):
                local = local.narrow(d, piece.at[d], stop - start)
            target = whole[name]
            for d, (start, stop) in enumerate(piece.box):
                target = target.narrow(d, start, stop - start)
            target.copy_(local)
    return whole


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(folder, source) -> bool:
    found, expected = together(folder), Checkpoint(source)
    assert found.keys() == expected.tensors.keys()
    return all(bits(found[name]) == bits(expected.read(name)) for name in found)


CASES = [
    ("llama", Layout(tp=2, pp=2), Layout(pp=2, dp=2, zero=3)),
    ("llama-tied", Layout(tp=2, pp=2), Layout(tp=4, dp=2, zero=1)),
    ("phi3", Layout(tp=2), Layout(tp=2, dp=3, zero=3)),
    ("phi3", Layout(tp=4), Layout(tp=2, pp=2, cp=2, zero=3)),
    ("gpt2", Layout(tp=2), Layout(dp=4, zero=3)),
    ("mixtral", Layout(tp=2, ep=2), Layout(tp=4, ep=2, etp=2, dp=2, zero=3)),
    ("qwen3-moe", Layout(dp=3, ep=3, zero=3), Layout(pp=2, dp=4, ep=2, etp=2, replicate=2, zero=3)),
    ("gemma3", Layout(pp=2, stages=(3, 4)), Layout(pp=2, chunks=2, schedule="zbv", stages=(1, 2, 2, 2))),
]


@pytest.mark.parametrize(("name", "first", "second"), CASES)
def test_shards_reassemble(tmp_path, family, name, first, second):
    source = family(name)
    model = PlanModel(open_checkpoint(source))
    write_shards(model, first, tmp_path / "a")
    write_shards(model, second, tmp_path / "b", source=tmp_path / "a")
    write_shards(model, first, tmp_path / "c", format="dcp", source=tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        assert verify_shards(folder, model.checkpoint) == []
        assert same(folder, source)


@pytest.mark.parametrize(("name", "first", "second"), CASES)
def test_files_are_a_function_of_layout_and_source(tmp_path, family, name, first, second):
    """Through another layout and back: the same bytes in every file."""
    model = PlanModel(open_checkpoint(family(name)))
    write_shards(model, first, tmp_path / "a")
    write_shards(model, second, tmp_path / "b", source=tmp_path / "a")
    write_shards(model, first, tmp_path / "c", source=tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "c").iterdir())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "c" / file).read_bytes() for file in files)


def test_local_tensors_are_what_a_runtime_wants(tmp_path, family):
    """Phi-3 stores q|k|v and gate|up as one tensor each: a rank gets its part of each, in this order."""
    source = family("phi3")
    weights = {name: Checkpoint(source).read(name) for name in Checkpoint(source).tensors}
    write_shards(PlanModel(open_checkpoint(source)), Layout(tp=2), tmp_path / "a")
    index = ShardIndex.load(tmp_path / "a")
    for rank in range(2):
        local = load_file(tmp_path / "a" / index.files[index.ranks[rank][0]])
        q, k, v = weights["model.layers.0.self_attn.qkv_proj.weight"].split([64, 32, 32])
        expected = torch.cat([part.chunk(2)[rank] for part in (q, k, v)])
        assert torch.equal(local["model.layers.0.self_attn.qkv_proj.weight"], expected)
        gate, up = weights["model.layers.0.mlp.gate_up_proj.weight"].chunk(2)
        expected = torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
        assert torch.equal(local["model.layers.0.mlp.gate_up_proj.weight"], expected)
        down = weights["model.layers.0.mlp.down_proj.weight"].chunk(2, dim=1)[rank]
        assert torch.equal(local["model.layers.0.mlp.down_proj.weight"], down)
        assert torch.equal(local["model.norm.weight"], weights["model.norm.weight"])
    assert index.tensors["model.layers.0.self_attn.qkv_proj.weight"].concatenated == 0
    assert index.tensors["model.layers.0.mlp.down_proj.weight"].concatenated is None


def test_ranks_with_the_same_bytes_share_a_file(tmp_path, family):
    model = PlanModel(open_checkpoint(family("llama")))
    index = write_shards(model, Layout(dp=4, tp=2, pp=2, zero=1), tmp_path / "a")
    assert len(index.files) == 4 and len(index.ranks) == 16
    assert index.ranks[0] == index.ranks[2] == index.ranks[6] == [0]
    assert (index.ranks[1], index.ranks[8]) == ([1], [2])
    assert sorted(path.name for path in (tmp_path / "a").glob("*.safetensors")) == sorted(index.files)
    index = write_shards(model, Layout(dp=4, replicate=2, zero=3), tmp_path / "b")
    assert index.ranks == [[0], [1], [0], [1]]


def test_stages_hold_their_blocks_and_both_ends_a_tied_table(tmp_path, family):
    model = PlanModel(open_checkpoint(family("llama-tied")))
    index = write_shards(model, Layout(pp=2), tmp_path / "a")
    table = "model.embed_tokens.weight"
    assert sorted(piece.file for piece in index.tensors[table].pieces) == [0, 1]
    assert [piece.file for piece in index.tensors["model.layers.1.mlp.up_proj.weight"].pieces] == [1]
    assert [piece.file for piece in index.tensors["model.norm.weight"].pieces] == [1]
    index = write_shards(model, Layout(pp=2), tmp_path / "b", format="dcp")
    assert len(index.tensors[table].pieces) == 1
    number = index.tensors[table].pieces[0].file
    assert number in index.ranks[0] and number in index.ranks[1], "one file, which both need"


def test_experts_lie_where_expert_parallelism_puts_them(family):
    model = PlanModel(open_checkpoint(family("mixtral")))
    layout = Layout(tp=2, dp=2, ep=2, etp=2)
    shapes = {name: info.shape for name, info in model.checkpoint.tensors.items()}
    placement = Placement(model, layout, rules(model), shapes)
    owners = defaultdict(set)
    for rank, place in enumerate(placement.mesh.all):
        for name, local in placement.of_rank(place).items():
            if "experts." in name:
                for box in local.boxes:
                    owners[name].add((rank, box))
    experts = [name for name in owners if rules(model)[name].expert is not None]
    fused = [name for name in owners if rules(model)[name].is_fused]
    assert experts or fused
    for name in experts:
        assert {rank // 2 for rank, _ in owners[name]} == {rules(model)[name].expert // 2}
    for name in fused:
        assert {box[0] for rank, box in owners[name] if rank < 2} == {(0, 2)}


def test_zero_3_cuts_as_fsdp2_does(family):
    """Rows of the local tensor in the sizes of torch.chunk; experts over the ranks that share them."""
    model = PlanModel(open_checkpoint(family("qwen3-moe")))
    shapes = {name: info.shape for name, info in model.checkpoint.tensors.items()}
    placement = Placement(model, Layout(tp=2, dp=3, ep=2, zero=3), rules(model), shapes)
    norm = [placement.of_rank(place).get("model.norm.weight") for place in placement.mesh.all]
    assert [local.shape[0] for local in norm] == [22, 22, 22, 22, 20, 20]
    name = next(name for name in shapes if "experts" in name)
    assert placement.layout.edp == 3
    held = {}
    for place in placement.mesh.all:
        local = placement.of_rank(place).get(name)
        if local is not None:
            held[place.edp, place.ep] = local.shape[0]
    whole = shapes[name][0] if rules(model)[name].expert is not None else shapes[name][0] // 2
    for (edp, _), extent in held.items():
        start, stop = chunk(whole, 3, edp)
        assert extent == stop - start


def test_loaded_by_torch_distributed_checkpoint(tmp_path, family):
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    for name, layout in (("phi3", Layout(tp=2, pp=2)), ("mixtral", Layout(dp=4, ep=2, zero=3))):
        source = family(name)
        folder = tmp_path / name
        index = write_shards(PlanModel(open_checkpoint(source)), layout, folder, format="dcp")
        assert name != "phi3" or len(index.files) > 4, "q, k and v of a rank are entries of the same name"
        expected = {key: Checkpoint(source).read(key) for key in Checkpoint(source).tensors}
        state = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
        load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_optimizer_states_move_with_their_weights(tmp_path, family):
    """Old shards with states of a trained model: cut as the weight is, over the ranks that ZeRO 1 shards states over."""
    source = family("llama")
    model = PlanModel(open_checkpoint(source))
    old = write_shards(model, Layout(), tmp_path / "old")
    weights = load_file(tmp_path / "old" / old.files[0])
    states = {
        f"optimizer.state.{kind}.{name}": torch.randn(tensor.shape)
        for name, tensor in weights.items()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    states |= {f"optimizer.state.step.{name}": torch.tensor(7.0) for name in weights} | {
        "optimizer.step": torch.tensor(7)
    }
    trained = add_tensors(tmp_path / "old", tmp_path / "trained", weights | states)
    layout = Layout(tp=2, pp=2, dp=2, zero=1)
    index = write_shards(model, layout, tmp_path / "new", source=trained)
    assert verify_shards(tmp_path / "new", model.checkpoint) == []
    found = together(tmp_path / "new")
    assert all(torch.equal(found[name], tensor) for name, tensor in (weights | states).items())
    assert len(index.files) == 8, "states differ over data-parallel ranks, weights do not"
    local = load_file(tmp_path / "new" / index.files[index.ranks[0][0]])
    name = "model.layers.0.mlp.down_proj.weight"
    assert local[name].shape == (64, 48) and local[f"optimizer.state.exp_avg.{name}"].shape == (32, 48)
    assert "optimizer.step" in local and f"optimizer.state.step.{name}" in local


def add_tensors(old, new, tensors):
    """Shards of one rank with more tensors in them, as a trainer might leave them."""
    from tersor.formats import linear_hash
    from tersor.formats.header import SAFETENSORS_DTYPES
    from tersor.formats.shards import Piece, ShardedTensor

    shutil.copytree(old, new)
    index = ShardIndex.load(new)
    save_file(tensors, new / index.files[0], {"format": "pt"})
    index.file_bytes[0] = (new / index.files[0]).stat().st_size
    for name, tensor in tensors.items():
        if name not in index.tensors:
            shape, box = tuple(tensor.shape), tuple((0, extent) for extent in tensor.shape)
            data = tensor.numpy().view({4: np.uint32, 8: np.uint64}[tensor.itemsize])
            digest = linear_hash.to_text(linear_hash.of_box(data, box, shape))
            dtype = SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")]
            index.tensors[name] = ShardedTensor(dtype, shape, digest, None, [Piece(0, box, (0,) * len(shape), digest)])
    index.save(new)
    return new


def test_another_checkpoint_is_refused(tmp_path, family):
    llama, other = PlanModel(open_checkpoint(family("llama"))), PlanModel(open_checkpoint(family("mistral")))
    write_shards(llama, Layout(tp=2), tmp_path / "a")
    with pytest.raises(TersorError, match="shards of another checkpoint"):
        write_shards(other, Layout(tp=2), tmp_path / "b", source=tmp_path / "a")
    problems = verify_shards(tmp_path / "a", other.checkpoint)
    assert len(problems) == 1 and "fingerprint" in problems[0]


def test_what_cannot_be_cut_is_refused(tmp_path, family):
    model = PlanModel(open_checkpoint(family("llama")))
    with pytest.raises(TersorError, match=r"cannot be cut with tp=3"):
        write_shards(model, Layout(tp=3), tmp_path / "a")
    with pytest.raises(TersorError, match=r"5 blocks, .* has 2"):
        write_shards(model, Layout(pp=2, stages=(2, 3)), tmp_path / "a")
    with pytest.raises(TersorError, match=r"format 'pickle'"):
        write_shards(model, Layout(), tmp_path / "a", format="pickle")
    assert not list(tmp_path.iterdir())


def test_packed_tensors_are_named_with_the_way_out(tmp_path, family):
    from tersor.ops.sparsify.run import Request, sparsify

    source = tmp_path / "pruned"
    shutil.copytree(family("llama"), source)
    weights = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name] * (torch.rand(weights[name].shape) < 0.2)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    sparsify(Request(model=str(source), output=tmp_path / "packed"))
    model = PlanModel(open_checkpoint(tmp_path / "packed"))
    with pytest.raises(TersorError, match="1 tensors are packed") as error:
        write_shards(model, Layout(tp=2), tmp_path / "a")
    assert "convert" in error.value.hint


@pytest.mark.parametrize(
    ("format", "symmetric"), [("compressed-tensors", True), ("compressed-tensors", False), ("gptq", True)]
)
def test_quantized_shards_decode_to_parts_of_the_weight(tmp_path, family, format, symmetric):
    """Cut between words and groups: what a rank holds decodes on its own."""
    from tersor.formats import encodings
    from tersor.ops.quantize.run import Request, quantize

    source = tmp_path / "int4"
    quantize(Request(str(family("llama")), source, group_size=16, format=format, symmetric=symmetric))
    model = PlanModel(open_checkpoint(source))
    write_shards(model, Layout(tp=2), tmp_path / "a")
    assert verify_shards(tmp_path / "a", model.checkpoint) == [] and same(tmp_path / "a", source)
    index, view = ShardIndex.load(tmp_path / "a"), DenseView(model.checkpoint)
    for rank in range(2):
        local = load_file(tmp_path / "a" / index.files[index.ranks[rank][0]])
        for part, dim in (("self_attn.k_proj", 0), ("self_attn.o_proj", 1), ("mlp.up_proj", 0), ("mlp.down_proj", 1)):
            module = f"model.layers.1.{part}"
            expected = view.read(f"{module}.weight").chunk(2, dim)[rank]
            local[f"{module}.weight_shape"] = torch.tensor(expected.shape)
            if f"{module}.g_idx" in local:
                local[f"{module}.g_idx"] = local[f"{module}.g_idx"] - local[f"{module}.g_idx"].min()
            scheme = view.tensors[f"{module}.weight"].scheme
            codes = view.encoding.decode(module, local.__getitem__, set(local), scheme)
            assert torch.equal(encodings.dequantize(codes, scheme), expected)


def test_a_cut_through_a_group_is_refused(tmp_path, family):
    from tersor.ops.quantize.run import Request, quantize

    quantize(Request(str(family("llama")), tmp_path / "int4", group_size=32))
    with pytest.raises(TersorError, match=r"down_proj.* cannot be cut with tp=2"):
        write_shards(PlanModel(open_checkpoint(tmp_path / "int4")), Layout(tp=2), tmp_path / "a")


def test_what_a_rank_should_hold_is_checked_against_the_plan(tmp_path, family):
    model = PlanModel(open_checkpoint(family("llama")))
    write_shards(model, Layout(tp=2, pp=2), tmp_path / "a")
    index = ShardIndex.load(tmp_path / "a")
    index.ranks = [index.ranks[rank] for rank in (1, 0, 2, 3)]
    index.save(tmp_path / "a")
    problems = verify_shards(tmp_path / "a", model.checkpoint)
    assert problems and all("rank 0 should hold" in line or "rank 1 should hold" in line for line in problems)
    index.layout["tp"] = 4
    index.save(tmp_path / "a")
    assert verify_shards(tmp_path / "a", model.checkpoint) == ["the layout has 8 ranks, shards.json lists 4"]
    index.layout["tp"] = "two"
    index.save(tmp_path / "a")
    assert "tp is 'two'" in verify_shards(tmp_path / "a", model.checkpoint)[0]


@pytest.mark.parametrize("format", ["rank", "dcp"])
def test_every_dtype_travels(tmp_path, format):
    """Whatever the dtype: bytes are moved, not numbers. Tensors without elements stay in the index."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32,
    }  # fmt: skip
    dtypes = ["F8_E4M3", "I8", "BF16", "F32", "F64", "BOOL"]
    layout = {"model.embed_tokens.weight": ("BF16", (32, 16)), "model.norm.weight": ("BF16", (16,))}
    block = "model.layers.0"
    for number, (part, shape) in enumerate(
        [("self_attn.q_proj", (16, 16)), ("self_attn.k_proj", (8, 16)), ("self_attn.v_proj", (8, 16)),
         ("self_attn.o_proj", (16, 16)), ("mlp.up_proj", (32, 16)), ("mlp.gate_proj", (32, 16)), ("mlp.down_proj", (16, 32))]
    ):  # fmt: skip
        layout[f"{block}.{part}.weight"] = (dtypes[number % len(dtypes)], shape)
    layout["lm_head.weight"] = ("F16", (32, 16))
    source = write_layout(tmp_path / "model", config, layout)
    raw = bytearray((source / "model.safetensors").read_bytes())
    start = min(info.offset for info in Checkpoint(source).tensors.values())
    raw[start:] = np.random.default_rng(0).integers(0, 2, len(raw) - start, np.uint8).tobytes()
    (source / "model.safetensors").write_bytes(raw)
    write_shards(PlanModel(open_checkpoint(source)), Layout(tp=2), tmp_path / "a", format=format)
    assert verify_shards(tmp_path / "a", Checkpoint(source)) == [] and same(tmp_path / "a", source)
    entries = json.loads((tmp_path / "a" / "shards.json").read_text())["tensors"]
    assert {name: entry["dtype"] for name, entry in entries.items()} == {
        name: dtype for name, (dtype, _) in layout.items()
    }
