"""What `--loss` and `--layer-map` say, and what of two models can be compared: vocabularies and blocks."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.ops.distill.losses.attention import AttentionLoss
from tersor.ops.distill.losses.layer_map import kept_blocks, layer_map
from tersor.ops.distill.losses.objective import Objective
from tersor.ops.distill.losses.parse import check_teacher, parse_loss
from tersor.ops.distill.losses.vocabulary import align, tokens_of
from tersor.ops.model.skeleton import find_blocks
from tersor.ops.prune.request import Request
from tersor.ops.prune.run import prune

# ---------------------------------------------------------------- --loss


def test_parse():
    terms = parse_loss("kl=1, js:0.3=0.5,hidden:1=2,next,attention:3=0.1,bd-kd")
    assert [(term.name, term.weight) for term in terms] == [
        ("kl", 1), ("js", 0.5), ("hidden", 2), ("next", 1), ("attention", 0.1), ("bd-kd", 1),
    ]  # fmt: skip
    assert [term.parameter for term in terms] == [None, 0.3, 1, None, 3, 2 / 3]
    assert [term.needs for term in terms] == ["logits", "logits", "blocks", "text", "attention", "logits"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kll=1", "'kll' is no loss"), ("", "'' is no loss"), ("kl=1,", "'' is no loss"), ("kl,kl=2", "twice"),
        ("js:0.3,js:0.5", "twice"), ("kl=0", "not a positive"), ("kl=-1", "not a positive"), ("kl=nan", "not a positive"),
        ("kl=inf", "not a positive"), ("kl=", "not a positive"), ("kl=x", "not a positive"), ("kl:2=1", "takes no"),
        ("js:1=1", "between 0 and 1"), ("js:nan=1", "between 0 and 1"), ("attention:1.5", "whole number"),
        ("hidden:-1", "within 0 to 4"), ("js:=1", "beta"),
    ],
)  # fmt: skip
def test_parse_refuses(text, message):
    with pytest.raises(TersorError, match=message) as error:
        parse_loss(text)
    assert error.value.hint


def test_unknown_names_list_the_known_ones():
    with pytest.raises(TersorError) as error:
        parse_loss("cosine=1")
    assert all(name in error.value.hint for name in ("kl", "reverse-kl", "top-k-kl", "bd-kd", "hidden", "attention"))


@pytest.mark.parametrize(
    ("text", "teacher", "message"),
    [
        ("kl", None, "kl compares with a teacher"), ("next,hidden", None, "hidden compares"),
        ("kl,hidden", "cached", "hidden looks into the teacher's blocks"), ("attention", "cached", "attention looks"),
        ("mse", "cached", "mse needs all"),
    ],
)  # fmt: skip
def test_what_a_teacher_lacks(text, teacher, message):
    with pytest.raises(TersorError, match=message):
        check_teacher(parse_loss(text), teacher)
    check_teacher(parse_loss(text), "model")


def test_what_needs_no_more():
    check_teacher(parse_loss("next"), None)
    check_teacher(parse_loss("kl,reverse-kl,js,bd-kd,top-k-kl,next"), "cached")


# ---------------------------------------------------------------- vocabularies


def tokens(count, **others):
    return {f"t{index}": index for index in range(count)} | others


def test_padded_vocabularies():
    found = align(tokens(100), tokens(100), 128, 104)
    assert found.common == 104 and found.checked and not found.whole
    assert "104" in found.describe() and "128" in found.describe() and "in common" in found.describe()
    assert align(tokens(100), tokens(100), 100, 100).whole
    # added tokens that differ are not common, nor is a token where the other has padding
    assert align(tokens(100, a=100, b=101), tokens(100, c=100), 128, 128).common == 100
    assert align(tokens(100), tokens(100, c=103), 128, 128).common == 103


def test_renamed_tokens_in_the_middle():
    other = tokens(1000)
    del other["t500"]
    found = align(tokens(1000), other | {"reserved": 500}, 1000, 1000)
    assert found.common == 1000 and found.renamed == (500,) and "other names (ids 500)" in found.describe()


def test_vocabularies_that_share_nothing():
    other = {f"u{index}": index for index in range(100)}
    for another in (other, other | {"t3": 3}, {f"t{index}": (7 * index + 1) % 100 for index in range(100)}):
        with pytest.raises(TersorError, match="vocabularies of student and teacher agree in") as error:
            align(tokens(100), another, 100, 100)
        assert "tokenizer" in error.value.hint
    with pytest.raises(TersorError):  # the same first special tokens are no common vocabulary
        align(
            {"<s>": 0, "</s>": 1} | {f"a{i}": i for i in range(2, 90)},
            {"<s>": 0, "</s>": 1} | {f"b{i}": i for i in range(2, 90)},
            90,
            90,
        )


def test_without_tokenizers(family, tmp_path):
    assert tokens_of(tmp_path) is None
    found = align(None, tokens(10), 12, 16)
    assert found.common == 12 and "could not be compared" in found.describe()
    own = tokens_of(family("llama"))
    assert len(own) == 256 and align(own, own, 256, 264).common == 256


# ---------------------------------------------------------------- which blocks


def test_even_and_explicit_maps():
    assert layer_map(None, 3, 3).outputs == ((0, 0), (1, 1), (2, 2))
    even = layer_map(None, 4, 12)
    assert even.outputs == even.attention == ((0, 2), (1, 5), (2, 8), (3, 11)) and "even" in even.describe()
    assert layer_map(None, 5, 7).outputs[-1] == (4, 6)
    assert layer_map(None, 4, 2).outputs == ((0, 0), (1, 0), (2, 1), (3, 1))
    given = layer_map("1:3, 0:0", 2, 4)
    assert given.outputs == given.attention == ((0, 0), (1, 3)) and "0:0, 1:3" in given.describe()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("0", "'0' is no pair"), ("0:0,", "'' is no pair"), ("a:1", "no pair"), ("0:-1", "no pair"), ("2:0", "student has no"),
        ("0:4", "teacher has no block 4"), ("0:0,0:1", "twice"),
    ],
)  # fmt: skip
def test_maps_that_do_not_fit(spec, message):
    with pytest.raises(TersorError, match=message) as error:
        layer_map(spec, 2, 4)
    assert error.value.hint


def test_map_of_kept_blocks():
    found = layer_map(None, 3, 6, kept=[0, 2, 3])
    assert found.attention == ((0, 0), (1, 2), (2, 3))
    assert found.outputs == ((0, 1), (1, 2), (2, 5))  # what the next block, or the last norm, was fed


def test_kept_blocks_from_reports(family, tmp_path):
    """Two rounds of pruning, and a step between them that removes nothing."""
    folder = family("llama", "float32", num_hidden_layers=6)
    options = {"remove": "layers", "method": "even"}
    first = prune(Request(str(folder), tmp_path / "a", sparsity=0.34, **options)).quality["removed_from_blocks"]
    prune(Request(str(tmp_path / "a"), tmp_path / "b", remove="weights", method="magnitude", sparsity=0.5))
    second = prune(Request(str(tmp_path / "b"), tmp_path / "c", sparsity=0.25, **options))
    left = [index for index in range(6) if index not in first]
    kept = [block for index, block in enumerate(left) if index not in second.quality["removed_from_blocks"]]
    assert len(kept) == 3
    assert kept_blocks(tmp_path / "c", 3, None, 6) == kept
    assert kept_blocks(tmp_path / "c", 3, Checkpoint(folder).fingerprint(), 6) == kept
    assert kept_blocks(tmp_path / "a", 4, None, 6) == left
    between = kept_blocks(tmp_path / "c", 3, Checkpoint(tmp_path / "a").fingerprint(), 4)
    assert [left[index] for index in between] == kept
    assert kept_blocks(tmp_path / "c", 2, None, 6) is None  # a report of something else
    assert kept_blocks(folder, 6, None, 6) is None
    # such a student's block equals the teacher's where its input does
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(folder)
    start = layer_map(None, 4, 6, left).attention
    mine, theirs = (find_blocks(model)[1] for model in (student, teacher))
    for s, t in start:
        assert torch.equal(mine[s].self_attn.q_proj.weight, theirs[t].self_attn.q_proj.weight)
    (tmp_path / "a" / "report.json").write_text(json.dumps({"schema": "other"}))
    assert kept_blocks(tmp_path / "a", 4, None, 6) is None


def test_attention_takes_the_last_pairs():
    layers = layer_map(None, 4, 8)
    assert Objective(parse_loss("attention"), layers=layers).compared.attention == ((3, 7),)
    assert Objective(parse_loss("attention:3"), layers=layers).compared.attention == layers.attention[1:]
    assert isinstance(Objective(parse_loss("attention:9"), layers=layers).attention, AttentionLoss)
    only_text = Objective(parse_loss("next"))
    assert not only_text.compared.logits and list(only_text.parameters()) == []
