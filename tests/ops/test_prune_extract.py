"""`prune --extract`: a smaller checkpoint that loads in transformers and computes what the sub-network did in training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.elastic import FILE, read_elastic, resolve
from tersor.formats.errors import TersorError
from tersor.ops.distill.elastic.elastic import Elastic
from tersor.ops.distill.request import Request as DistillRequest
from tersor.ops.distill.students.build import build
from tersor.ops.prune.extract.plan import merged
from tersor.ops.prune.forecast import forecast
from tersor.ops.prune.request import Request
from tersor.ops.prune.rounds import prune as prune_rounds
from tersor.ops.prune.run import plan, prune
from tersor.ops.verify.run import verify
from tiny_models import FAMILIES
from typer.testing import CliRunner

CPU = torch.device("cpu")
IDS = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(1))
SHARES = {"neurons": (1, 0.75, 0.5), "heads": (1, 0.5), "depth": (1, 0.75, 0.5)}
LOADED = ("llama-tied", "llama-bias", "qwen3", "gemma", "gemma3", "phi3", "mixtral", "qwen2-moe")  # any width
ZEROS_FOR_HEADS = ("gpt2", "opt")  # whose config.json cannot say that there are fewer heads


@pytest.fixture(scope="module")
def elastic(family, tmp_path_factory):
    """elastic(name) -> (folder of an elastic checkpoint, logits(network) of the model it was written from)."""
    made = {}

    def get(name, per_block=False):
        if (name, per_block) not in made:
            layers = {} if name == "gemma3" else {"n_layer" if name == "gpt2" else "num_hidden_layers": 4}
            source = family(name, "float32", **layers)
            run = Elastic(DenseView(Checkpoint(source)), CPU, None, shares=SHARES, per_block=per_block)
            student = build(run.view, DistillRequest(student=str(source), output=source / "out"), CPU)
            run.bind(student.model.eval())
            run.record([2.0, 2.1, 2.2, 2.3])
            folder = tmp_path_factory.mktemp("elastic") / name
            shutil.copytree(source, folder)
            save_file(dict(student.export()), folder / "model.safetensors", metadata={"format": "pt"})
            (folder / FILE).write_text(json.dumps(run.document()))

            def logits(config, folder=folder, run=run, model=student.model):
                network = resolve(config, read_elastic(Checkpoint(folder)), folder)
                with run.running(network), torch.no_grad():
                    return model(input_ids=IDS).logits, run.space.costs.parameters(network)

            made[name, per_block] = folder, logits
        return made[name, per_block]

    return get


def extract(folder, output, config, **settings):
    return prune(Request(str(folder), output, extract=config, device="cpu", **settings))


@torch.no_grad()
def outputs(folder, name):
    """Logits of the model from `from_pretrained`, which must find exactly the tensors that it wants."""
    class_ = getattr(transformers, FAMILIES[name][0])
    model, info = class_.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()(input_ids=IDS).logits


def close(found, expected):
    return found.shape == expected.shape and float((found - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("name", LOADED)
def test_extracted_computes_what_the_sub_network_did(elastic, tmp_path, name):
    folder, logits = elastic(name)
    config = "neurons=0.75,heads=0.5,depth=0.75"
    report = extract(folder, tmp_path / "out", config)
    expected, parameters = logits(config)
    assert close(outputs(tmp_path / "out", name), expected)
    assert not close(outputs(folder, name), expected)
    assert report.totals()["params_after"] == parameters < report.totals()["params_before"]
    assert not (tmp_path / "out" / FILE).exists() and (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ZEROS_FOR_HEADS)
def test_families_without_a_head_size(elastic, tmp_path, name):
    folder, logits = elastic(name)
    extract(folder, tmp_path / "out", "neurons=0.5,depth=0.75")
    assert close(outputs(tmp_path / "out", name), logits("neurons=0.5,depth=0.75")[0])
    with pytest.raises(TersorError, match="makes the number of heads smaller") as error:
        extract(folder, tmp_path / "heads", "heads=0.5")
    assert "--keep-shape" in error.value.hint and not (tmp_path / "heads").exists()


@pytest.mark.parametrize("name", [*ZEROS_FOR_HEADS, "llama-bias", "mixtral"])
def test_keep_shape_writes_zeros(elastic, tmp_path, name):
    """Other widths in each block, and a block that goes."""
    folder, logits = elastic(name)
    config = json.dumps({"neurons": [0.5, 1, 0.75, 0.25], "heads": [0.5, 1, 0.5, 1], "depth": 0.75})
    extract(folder, tmp_path / "out", config, keep_shape=True)
    assert close(outputs(tmp_path / "out", name), logits(config)[0])
    shapes = [
        {key: value.shape for key, value in load_file(path / "model.safetensors").items()}
        for path in (folder, tmp_path / "out")
    ]
    assert shapes[0] == shapes[1]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_only_the_keys_that_must_change(elastic, tmp_path):
    for name, changed in (
        ("qwen3", {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}),
        ("qwen2-moe", {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
    ):  # fmt: skip
        folder, _ = elastic(name)
        extract(folder, tmp_path / name, "smallest")
        before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / name))
        assert {key: after[key] for key in changed} == changed
        assert {key for key in after if after[key] != before.get(key)} - changed.keys() <= {
            "layer_types",
            "max_window_layers",
        }
        assert not verify(tmp_path / name).problems


def test_slices_are_prefixes_bit_for_bit(elastic, tmp_path):
    folder, _ = elastic("llama-bias")
    extract(folder, tmp_path / "out", "neurons=0.5,heads=0.5,depth=0.5")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    kept = read_elastic(Checkpoint(folder)).kept_blocks(0.5)
    assert len(kept) == 2 and {int(name.split(".")[2]) for name in after if ".layers." in name} == {0, 1}
    for new, old in enumerate(kept):
        for name, rows, columns in (("mlp.up_proj", 48, 64), ("mlp.down_proj", 64, 48), ("self_attn.q_proj", 32, 64),
                                    ("self_attn.k_proj", 16, 64), ("self_attn.o_proj", 64, 32)):  # fmt: skip
            found = after[f"model.layers.{new}.{name}.weight"]
            assert torch.equal(found, before[f"model.layers.{old}.{name}.weight"][:rows, :columns])
            bias = after[f"model.layers.{new}.{name}.bias"]
            assert torch.equal(bias, before[f"model.layers.{old}.{name}.bias"][:rows])


def test_everything_is_a_copy(elastic, tmp_path):
    folder, _ = elastic("llama-tied")
    report = extract(folder, tmp_path / "out", "largest")
    assert {entry.action for entry in report.tensors} == {"keep"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_unequal_widths_are_refused_but_for_zeros(elastic, tmp_path):
    folder, _ = elastic("llama-tied")
    with pytest.raises(TersorError, match="48 of 96 neurons stay in block 0 and 96 in block 1") as error:
        plan(Request(str(folder), tmp_path / "out", extract='{"neurons": [0.5, 1, 1, 1]}'))
    assert "--keep-shape" in error.value.hint
    # Unequal only in a block that goes: which one that is, the order says.
    gone = read_elastic(Checkpoint(folder)).blocks[-1]
    shares = [0.25 if block == gone else 0.5 for block in range(4)]
    extract(folder, tmp_path / "out", json.dumps({"neurons": shares, "depth": 0.75}))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 48


def test_names_files_and_the_report(elastic, tmp_path):
    folder, logits = elastic("llama-tied")
    (level,) = [name for name in read_elastic(Checkpoint(folder)).networks if name.startswith("level")][:1]
    (tmp_path / "small.json").write_text('{"neurons": 0.5, "heads": [0.5, 0.5, 0.5, 0.5]}')
    for config, described in ((level, None), (str(tmp_path / "small.json"), "neurons=0.5,heads=0.5,depth=1")):
        output = tmp_path / f"of {config[-5:]}"
        extract(folder, output, config)
        report = json.loads((output / "report.json").read_text())
        assert close(outputs(output, "llama-tied"), logits(report["args"]["extract"])[0])
        assert described in (None, report["args"]["extract"])
        assert report["args"]["remove"] == "extract" and report["quality"]["extracted"]["blocks"]
    assert (
        plan(Request(str(folder), tmp_path / "x", extract="neurons=0.3"))[1]
        .warnings[0]
        .startswith("not trained at neurons 0.3")
    )


def test_dry_run_knows_the_bytes(elastic, tmp_path):
    folder, _ = elastic("mixtral")
    request = Request(str(folder), tmp_path / "out", extract="neurons=0.5,heads=0.5,depth=0.75")
    expected = forecast(*plan(request), request)
    extract(folder, tmp_path / "out", request.extract)
    assert expected["output_bytes"] == Checkpoint(tmp_path / "out").nbytes


def test_interrupted_and_resumed_gives_the_same_bytes(elastic, tmp_path):
    folder, _ = elastic("llama-bias")
    config = "neurons=0.5,heads=0.5,depth=0.75"
    extract(folder, tmp_path / "whole", config)

    def interrupt(stage, done, total):
        if stage == "blocks" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(Request(str(folder), tmp_path / "out", extract=config, device="cpu"), interrupt)
    extract(folder, tmp_path / "out", config, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("tiny", "neither a file nor a network"),
        ("neurons=half", "could not convert"),
        ("neurons=0.5,width=0.5", "is not of the keys"),
        ("neurons=0.5,neurons=1", "names a share twice"),
        ("neurons=0", "is not a share"),
        ("depth=1.5", "is not a share"),
        ("{", "not readable as JSON"),
        ('{"neurons": [0.5, 0.5]}', "2 shares, the model 4 blocks"),
        ('{"neurons": [0, 0.5, 0.5, 0.5]}', "no neurons are left of block 0"),
    ],
)
def test_configs_that_are_none(elastic, tmp_path, config, message):
    with pytest.raises(TersorError, match=message):
        plan(Request(str(elastic("llama-tied")[0]), tmp_path / "out", extract=config))


@pytest.mark.parametrize(
    "settings",
    [{"remove": "neurons"}, {"method": "random"}, {"sparsity": 0.5}, {"allocate": "erk"}, {"multiple_of": 8},
     {"pattern": "2:4"}, {"include": ["mlp"]}, {"calib": "self"}, {"merge": True}],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_options_that_have_no_part_in_it(elastic, tmp_path, settings):
    with pytest.raises(TersorError, match="--extract"):
        plan(Request(str(elastic("llama-tied")[0]), tmp_path / "out", extract="smallest", **settings))


def test_rounds_have_no_part_in_it(elastic, tmp_path):
    with pytest.raises(TersorError, match="--extract"):
        prune_rounds(Request(str(elastic("llama-tied")[0]), tmp_path / "out", extract="smallest", rounds=2))


def test_checkpoints_that_are_not_elastic(elastic, family, tmp_path):
    with pytest.raises(TersorError, match=r"has no elastic.json") as error:
        plan(Request(str(family("llama")), tmp_path / "out", extract="smallest"))
    assert "--elastic" in error.value.hint
    other = tmp_path / "other"
    shutil.copytree(family("llama", "float32"), other)  # two blocks
    shutil.copy(elastic("llama-tied")[0] / FILE, other / FILE)
    with pytest.raises(TersorError, match="is of another model: it has 4 blocks"):
        plan(Request(str(other), tmp_path / "out", extract="smallest"))
    shutil.rmtree(other)
    shutil.copytree(family("llama", "float32", num_hidden_layers=4, intermediate_size=64), other)
    shutil.copy(elastic("llama-tied")[0] / FILE, other / FILE)
    with pytest.raises(TersorError, match="is of another model: it has 96 neurons"):
        plan(Request(str(other), tmp_path / "out", extract="smallest"))


def test_no_other_command_hands_on_the_order(elastic, tmp_path):
    """Whatever it did to the weights, they may be another order now."""
    folder, _ = elastic("llama-tied")
    prune(Request(str(folder), tmp_path / "out", method="magnitude", device="cpu"))
    assert (folder / FILE).exists() and not (tmp_path / "out" / FILE).exists()


def test_changes_of_one_entry_are_merged():
    raw = {"text": {"layers": 4, "width": 8, "same": 1}, "list": [1, 2]}
    narrow, shallow = {"text": raw["text"] | {"width": 4}}, {"text": raw["text"] | {"layers": 2}}
    checkpoint = type("Named", (), {"path": "here"})
    assert merged(raw, [narrow, shallow], checkpoint) == {"text": {"layers": 2, "width": 4, "same": 1}}
    assert merged(raw, [{"list": [1, 2]}, {"list": [1]}, {}], checkpoint) == {"list": [1]}
    with pytest.raises(TersorError, match="both fewer blocks and narrower ones change 'list'"):
        merged(raw, [{"list": [1]}, {"list": [2]}], checkpoint)


def test_the_command(elastic, tmp_path):
    from tersor.cli.main import app

    folder, logits = elastic("llama-tied")
    run = CliRunner().invoke(app, ["prune", str(folder), "-o", str(tmp_path / "out"), "--extract", "smallest"])
    assert run.exit_code == 0, run.output
    assert run.stdout.strip().splitlines()[-1] == str(tmp_path / "out")
    assert close(outputs(tmp_path / "out", "llama-tied"), logits("smallest")[0])
    again = CliRunner().invoke(app, ["prune", str(folder), "--extract", "depth=0.5", "--dry-run", "--json"])
    assert again.exit_code == 0 and json.loads(again.stdout)["output_bytes"] < Checkpoint(folder).nbytes
